"""Calls as clients make them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import openai
import pytest
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc

from tests.e2e.conftest import Api
from tests.gateway.client import get, post
from tests.stack import MODEL, wait_for

HELLO_WORLD = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.stack.url}/v1", api_key=api.key, max_retries=0)


def test_the_published_vector(api: Api) -> None:
    answer = api.embed()
    assert answer.status == 200
    assert list(answer.json) == ["model", "object", "usage", "data"]
    # bf16 is the default where the processor has it.
    np.testing.assert_allclose(answer.json["data"][0]["embedding"][:5], HELLO_WORLD, atol=2e-3)


def test_headers_of_an_answer(api: Api) -> None:
    answer = post(
        api.stack.http_port,
        {"model": MODEL, "input": "x"},
        {**api.authorization, "x-request-id": "e2e-1"},
    )
    assert answer.headers["x-request-id"] == "e2e-1"
    assert answer.headers["x-ratelimit-remaining-requests"].isdigit()
    assert answer.headers["x-ratelimit-remaining-tokens"].isdigit()
    assert re.match(r"tokenize;dur=[\d.]+, queue;dur=", answer.headers["server-timing"])


def test_one_request_id_from_end_to_end(api: Api) -> None:
    answer = api.post(b"{")
    name = answer.headers["x-request-id"]
    assert answer.json["request_id"] == name
    service = api.stack.services[0].command
    wait_for(lambda: name in service.text())
    wait_for(lambda: any(entry["request_id"] == name for entry in api.stack.access_log()))
    (entry,) = [entry for entry in api.stack.access_log() if entry["request_id"] == name]
    assert (entry["status"], entry["path"], entry["method"]) == (422, "/v1/embeddings", "POST")
    assert api.key not in api.stack.envoy.text()


def test_openai_sdk(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["hello world", "good morning"])
    assert [item.index for item in answer.data] == [0, 1]
    np.testing.assert_allclose(answer.data[0].embedding[:5], HELLO_WORLD, atol=2e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert [model.id.rpartition("/")[2] for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("arguments", "error", "code", "param", "words"),
    [
        (
            {"model": "nope", "input": "x"},
            openai.BadRequestError,
            "model_not_found",
            "model",
            "'nope' not found",
        ),
        ({"model": MODEL, "input": []}, openai.UnprocessableEntityError, "validation_error", None, "empty"),
        (
            {"model": MODEL, "input": "x", "dimensions": -1},
            openai.UnprocessableEntityError,
            "validation_error",
            "dimensions",
            "greater than 0",
        ),
        (
            {"model": MODEL, "input": "word " * 600},
            openai.BadRequestError,
            "context_length_exceeded",
            "input",
            "maximum of 512 tokens",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_openai_sdk_shows_our_errors(
    client: openai.OpenAI,
    arguments: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str | None,
    words: str,
) -> None:
    with pytest.raises(error) as failure:
        client.embeddings.create(**arguments)
    shown = failure.value
    assert (shown.code, shown.param, shown.type) == (code, param, "invalid_request_error")
    assert words in str(shown)
    assert shown.request_id == shown.response.json()["request_id"]


def test_openai_sdk_shows_what_the_gateway_says(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No such path") as failure:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert failure.value.code == "unknown_url"
    with pytest.raises(openai.AuthenticationError, match="Invalid API key") as refused:
        client.with_options(api_key="jina_" + "0" * 60).embeddings.create(model=MODEL, input="x")
    assert (refused.value.code, refused.value.type) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_typed_grpc_through_the_gateway(api: Api, port: str) -> None:
    request = embed_pb2.EmbedRequest(model=MODEL, inputs=[common_pb2.Content(text="hello world")])
    with grpc.insecure_channel(f"127.0.0.1:{getattr(api.stack, port)}") as channel:
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        metadata = list(api.authorization.items())
        answer = stub.Embed(request, metadata=metadata, timeout=100)
        np.testing.assert_allclose(answer.embeddings[0].dense.values[:5], HELLO_WORLD, atol=2e-3)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Embed(request, timeout=100)
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED

        def messages():
            for index in range(200):
                text = common_pb2.Content(text=f"text {index}")
                yield embed_pb2.EmbedStreamRequest(id=str(index), model=MODEL, input=text)

        answers = list(stub.EmbedStream(messages(), metadata=metadata, timeout=100))
        assert [answer.id for answer in answers] == [str(index) for index in range(200)]


@pytest.mark.parametrize(("count", "least"), [(256, 1 << 20), (2048, 8 << 20)])
def test_large_answers(api: Api, count: int, least: int) -> None:
    answer = api.embed([f"text number {index}" for index in range(count)])
    assert answer.status == 200
    assert len(answer.body) > least
    assert [item["index"] for item in answer.json["data"]] == list(range(count))


def test_concurrent_callers_get_their_own(api: Api) -> None:
    texts = [f"a text of number {index}" for index in range(64)]
    together = api.embed(texts).json["data"]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(api.embed, texts))
    for item, answer in zip(together, answers, strict=True):
        one, other = np.array(item["embedding"]), np.array(answer.json["data"][0]["embedding"])
        assert one @ other > 0.9995


def test_ready_lists_the_checks(api: Api) -> None:
    answer = get(api.stack.http_port, "/ready")
    assert answer.json["checks"]["pool-0"]["checks"] == {"engine": "ok", "database": "ok"}


def test_the_openapi_document_is_that_of_this_installation(api: Api) -> None:
    document = get(api.stack.http_port, "/openapi.json").json
    assert MODEL in json.dumps(document["paths"]["/v1/embeddings"])

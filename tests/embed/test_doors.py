"""Both doors over the real server, engine and model: the same behaviour, each in its own form."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import orjson
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2
from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, NotANumberError
from services.embed.logic import Embedder
from services.embed.types import EmbedRequest
from tests.embed.conftest import SETTINGS, Rig
from tests.rig import ALIAS, detail, load_without_numbers, told

pytestmark = pytest.mark.asyncio(loop_scope="module")

MINILM = "all-MiniLM-L6-v2"
HELLO = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
"""The first numbers of "hello world", as published with the model by others."""

ENCODINGS = {
    "float": common_pb2.VECTOR_ENCODING_FLOAT,
    "base64": common_pb2.VECTOR_ENCODING_FLOAT32_BYTES,
    "binary": common_pb2.VECTOR_ENCODING_BINARY,
    "ubinary": common_pb2.VECTOR_ENCODING_UBINARY,
}


async def post(rig: Rig, body: Any) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return (await rig.rest.CreateEmbeddings(httpbody_pb2.HttpBody(data=data))).data


async def post_json(rig: Rig, **fields: Any) -> dict[str, Any]:
    return orjson.loads(await post(rig, {"model": MINILM, "input": "hello world"} | fields))


async def vector(rig: Rig, **fields: Any) -> np.ndarray:
    return np.array((await post_json(rig, **fields))["data"][0]["embedding"], dtype=np.float32)


async def refused(rig: Rig, body: Any) -> tuple[int, dict[str, Any]]:
    """HTTP status and body, as the gateway would answer them."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await post(rig, body)
    return told(caught.value)


def request(*texts: str, model: str = MINILM, **options: Any) -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(
        model=model,
        inputs=[common_pb2.Content(text=text) for text in texts],
        options=embed_pb2.EmbedOptions(**options),
    )


async def test_rest_golden_vector(rig: Rig) -> None:
    data = await vector(rig)
    assert data.shape == (384,)
    assert data[:5] == pytest.approx(HELLO, abs=1e-4)
    assert np.linalg.norm(data) == pytest.approx(1.0, abs=1e-5)


async def test_typed_golden_vector(rig: Rig) -> None:
    response = await rig.typed.Embed(request("hello world"))
    (embedding,) = response.embeddings
    assert response.model == MINILM
    assert embedding.dense.dimensions == 384
    assert embedding.dense.values[:5] == pytest.approx(HELLO, abs=1e-4)
    assert (response.usage.total_tokens, response.usage.prompt_tokens) == (4, 4)
    assert not response.usage.HasField("image_tokens")
    assert response.timings.inference.ToNanoseconds() > 0


async def test_body_on_the_wire(rig: Rig) -> None:
    body = await post(rig, {"model": f"jina-ai/{MINILM}", "input": ["a", {"text": "b"}], "user": "me"})
    start = (
        b'{"model":"all-MiniLM-L6-v2","object":"list","usage":{"total_tokens":6,"prompt_tokens":6},"data":['
        b'{"object":"embedding","index":0,"embedding":['
    )
    assert body.startswith(start)
    assert b'{"object":"embedding","index":1,"embedding":[' in body


@pytest.mark.parametrize(
    "value", ["hello world", {"text": "hello world"}, ["hello world"], [{"text": "hello world"}]]
)
async def test_every_form_of_input_is_the_same_text(rig: Rig, value: Any) -> None:
    body = await post_json(rig, input=value)
    assert len(body["data"]) == 1
    assert body["data"][0]["embedding"][:5] == pytest.approx(HELLO, abs=1e-4)


async def test_order_of_texts_of_all_lengths(rig: Rig) -> None:
    texts = ["word " * (37 * n % 60) + str(n) for n in range(60)]
    together = await post_json(rig, input=texts)
    assert [item["index"] for item in together["data"]] == list(range(60))
    alone = await asyncio.gather(*(vector(rig, input=text) for text in texts))
    stacked = np.array([item["embedding"] for item in together["data"]])
    assert (np.sum(stacked * np.array(alone), axis=1) > 0.9999).all()


@pytest.mark.parametrize("text", ["", " ", "\n\t", "a\0b", "\U0001f600", "x" * 300])
async def test_odd_texts(rig: Rig, text: str) -> None:
    data = await vector(rig, input=text)
    assert np.isfinite(data).all()
    typed = await rig.typed.Embed(request(text))
    assert np.array_equal(np.array(typed.embeddings[0].dense.values, np.float32), data)


async def test_dimensions_and_normalized(rig: Rig) -> None:
    raw = await vector(rig, normalized=False)
    assert abs(np.linalg.norm(raw) - 1.0) > 0.01
    short = await vector(rig, dimensions=7, normalized=False)
    assert np.array_equal(short, raw[:7])
    unit = await vector(rig, dimensions=7)
    assert unit == pytest.approx(raw[:7] / np.linalg.norm(raw[:7]), abs=1e-6)


@pytest.mark.parametrize("encoding", list(ENCODINGS))
@pytest.mark.parametrize("dimensions", [384, 13])
async def test_encodings_agree_between_the_doors(rig: Rig, encoding: str, dimensions: int) -> None:
    plain = await vector(rig, dimensions=dimensions)
    rest = (await post_json(rig, dimensions=dimensions, embedding_type=encoding))["data"][0]["embedding"]
    typed = await rig.typed.Embed(
        request("hello world", dimensions=dimensions, encodings=[ENCODINGS[encoding]])
    )
    dense = typed.embeddings[0].dense
    assert (dense.encoding, dense.dimensions) == (ENCODINGS[encoding], dimensions)
    if encoding == "float":
        assert np.array_equal(np.array(dense.values, np.float32), plain)
    elif encoding == "base64":
        assert np.array_equal(np.frombuffer(dense.data, "<f4"), plain)
    else:
        offset = 128 if encoding == "binary" else 0
        assert len(rest) == math.ceil(dimensions / 8)
        assert list(dense.data) == [byte % 256 for byte in rest]
        bits = np.unpackbits((np.array(rest, dtype=int) + offset).astype(np.uint8))
        assert np.array_equal(bits[:dimensions], plain > 0)


@pytest.mark.parametrize("encoding", ["float", ["base64", "float"]])
async def test_large_answers_are_written_in_slices(rig: Rig, encoding: Any) -> None:
    """At 384 numbers a vector a slice has 170 of them, or 85."""
    body = await post_json(rig, input=[f"text {n}" for n in range(400)], embedding_type=encoding)
    assert [item["index"] for item in body["data"]] == list(range(400))
    assert {item["object"] for item in body["data"]} == {"embedding"}
    first = "embedding" if encoding == "float" else "embeddings_by_type"
    vectors = [item[first] if encoding == "float" else item[first]["float"] for item in body["data"]]
    for n in (0, 84, 85, 169, 170, 399):
        assert vectors[n] == pytest.approx((await vector(rig, input=f"text {n}")).tolist(), abs=1e-5)


async def test_usage_counts_what_the_model_saw(rig: Rig) -> None:
    assert (await post_json(rig, input="word " * 5000, truncate=True))["usage"]["total_tokens"] == 512
    assert rig.access.charged == [512]


async def test_long_text_without_truncate(rig: Rig) -> None:
    status, body = await refused(rig, {"model": MINILM, "input": ["a", "word " * 5000]})
    assert (status, body["code"]) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert "512 tokens" in body["detail"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Embed(request("word " * 5000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rig.access.charged == []


async def test_an_alias_answers_under_its_own_name(rig: Rig) -> None:
    body = await post_json(rig, model=ALIAS)
    assert body["model"] == ALIAS
    assert body["data"][0]["embedding"][:5] == pytest.approx(HELLO, abs=1e-4)


@pytest.mark.parametrize("model", ["jina-embeddings-v3", "no-such-model"])
async def test_models_that_are_not_served(rig: Rig, model: str) -> None:
    status, body = await refused(rig, {"model": model, "input": "a"})
    assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
    assert body["detail"] == f"Model '{model}' not found. Available models: {MINILM}, {ALIAS}."
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Embed(request("a", model=model))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INPUT_MODEL_NOT_FOUND"


async def test_validation_error_over_rest(rig: Rig) -> None:
    status, body = await refused(rig, {"model": MINILM, "input": "a", "dimensions": 385})
    field, message = f"body -> {MINILM} -> dimensions", "Input should be less than or equal to 384"
    assert status == 422
    assert body == {
        "detail": f"Validation error: '{field}' {message}",
        "code": "VALIDATION_ERROR",
        "request_id": body["request_id"],
        "error": body["error"],
        "errors": [
            {
                "field": field,
                "message": message,
                "type": "less_than_equal",
                "input": 385,
            }
        ],
    }


async def test_validation_error_over_grpc(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Embed(request("a", dimensions=385, task=99, encodings=[1, 77]))
    violations = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert {violation.field for violation in violations} == {"options.dimensions", "options.encodings[1]"}
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "json_invalid"),
        (b'{"model":', "json_invalid"),
        (b'{"model": "all-MiniLM-L6-v2", "input": "\xff"}', "json_invalid"),
        (b'{"model": "all-MiniLM-L6-v2", "input": "\\ud800"}', "json_invalid"),
        (b"[]", "dict_type"),
        (b'"text"', "dict_type"),
        (b"{}", "missing"),
        (b'{"model":"all-MiniLM-L6-v2","input":' + b"[" * 100 + b"]" * 100 + b"}", "text_type"),
    ],
)
async def test_bodies_that_are_no_request(rig: Rig, body: bytes, kind: str) -> None:
    status, answer = await refused(rig, body)
    assert (status, answer["code"]) == (422, "VALIDATION_ERROR")
    assert [error["type"] for error in answer["errors"]] == [kind]


async def test_tokens_are_charged_before_they_are_spent(rig: Rig) -> None:
    rig.access.refuse = ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)
    status, body = await refused(rig, {"model": MINILM, "input": "a"})
    assert (status, body["code"]) == (403, "AUTHZ_INSUFFICIENT_BALANCE")


async def test_vectors_that_are_not_numbers_are_no_answer(rig: Rig) -> None:
    engine = await Engine.start(SETTINGS, rig.catalog, load=load_without_numbers)
    with pytest.raises(NotANumberError):
        await Embedder(engine, SETTINGS).embed(EmbedRequest(MINILM, ["a"]), Call("test"))
    await engine.stop(1.0)


class Bridge(httpx.AsyncBaseTransport):
    """Hands HTTP requests to the REST service as the gateway does."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.sent: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        self.sent.append(orjson.loads(body))
        return httpx.Response(
            200, content=await post(self._rig, body), headers={"content-type": "application/json"}
        )


@pytest.mark.parametrize("arguments", [{}, {"encoding_format": "float"}, {"dimensions": 12}])
async def test_openai_client(rig: Rig, arguments: dict[str, Any]) -> None:
    bridge = Bridge(rig)
    async with httpx.AsyncClient(transport=bridge) as http:
        client = openai.AsyncOpenAI(
            api_key="none", base_url="http://gateway/v1", http_client=http, max_retries=0
        )
        answer = await client.embeddings.create(model=MINILM, input=["hello world", "b"], **arguments)
    assert bridge.sent[0]["encoding_format"] == arguments.get("encoding_format", "base64")
    first, second = answer.data
    expected = await vector(rig, **{k: v for k, v in arguments.items() if k == "dimensions"})
    assert first.embedding == pytest.approx(expected.tolist(), abs=1e-6)
    assert (first.index, second.index) == (0, 1)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7

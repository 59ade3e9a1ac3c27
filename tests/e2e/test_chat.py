"""Chat through every door: REST and streams through the gateway, gRPC, OpenAI's SDK, Python, the command."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from searchfoundation.v1 import chat_pb2, chat_pb2_grpc, common_pb2

from search_foundation import load
from search_foundation.library import ModelError
from tests.e2e.conftest import Api
from tests.gateway.client import Answer
from tests.media.pictures import photograph
from tests.stack import MODEL, Stack, http_get
from tests.vlm_served import CACHE_BYTES, ENDLESS, FOR_EVER, PARROT, RANDOM, SAID, write_answering

QUESTION = [{"role": "user", "content": "hello"}]
PICTURE = f"data:image/jpeg;base64,{base64.b64encode(photograph('china.jpg')).decode()}"
SEEN = [
    {"role": "system", "content": "hello world"},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "text", "text": "hello?"},
        ],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answering(tmp_path_factory.mktemp("answering"))


@pytest.fixture(scope="module")
def api(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    settings = {
        "SF_DTYPE": "float32",
        "SF_MODEL_DIR": str(folder),
        "SF_CATALOG_FILE": str(folder / "catalog.yaml"),
        "SF_CHAT_HEARTBEAT_SECONDS": "0.02",
        "SF_CHAT_CACHE_BYTES": str(CACHE_BYTES),
    }
    with Stack(tmp_path_factory.mktemp("chat"), settings) as stack:
        stack.serve("chat", "embed", models=(RANDOM, PARROT, ENDLESS, MODEL))
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.stack.url}/v1", api_key=api.key, max_retries=0) as opened:
        yield opened


def ask(api: Api, model: str = PARROT, messages: Any = QUESTION, **fields: Any) -> Answer:
    return api.post({"model": model, "messages": messages, **fields}, "/v1/chat/completions")


def events(api: Api, **fields: Any) -> list[str]:
    body = {"model": PARROT, "messages": QUESTION, "stream": True, **fields}
    with httpx.stream(
        "POST", f"{api.stack.url}/v1/chat/completions", json=body, headers=api.authorization, timeout=60
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers
        return [line for line in answer.iter_lines() if line]


def test_an_answer_has_the_shape_of_openais(api: Api) -> None:
    answer = ask(api)
    body = answer.json
    assert answer.status == 200
    assert "server-timing" in answer.headers
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", PARROT)
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": SAID},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = body["usage"]
    assert usage["completion_tokens"] == len(SAID.encode())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_joins_to_the_whole_answer(api: Api) -> None:
    lines = events(api, stream_options={"include_usage": True}, model=f"jina-ai/{PARROT}")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *parts, last, usage = chunks
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == SAID
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == ask(api).json["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_picture_is_seen_and_counted(api: Api) -> None:
    with_picture = ask(api, RANDOM, SEEN, max_tokens=8).json
    without = ask(api, RANDOM, [SEEN[0], {"role": "user", "content": "hello?"}], max_tokens=8).json
    assert with_picture["choices"] != without["choices"]
    details = with_picture["usage"]["prompt_tokens_details"]
    more = with_picture["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"]
    assert details["image_tokens"] in (more, more - 1, more + 1)
    streamed = events(api, model=RANDOM, messages=SEEN, max_tokens=8)
    texts = [json.loads(line[6:])["choices"][0]["delta"] for line in streamed if line.startswith("data: {")]
    assert "".join(t.get("content", "") for t in texts) == with_picture["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"n": 2}, 422, f"body -> {PARROT} -> n"),
        ({"tools": [{"type": "function"}]}, 422, f"body -> {PARROT} -> tools"),
        ({"temperature": 3}, 422, f"body -> {PARROT} -> temperature"),
        ({"messages": []}, 422, f"body -> {PARROT} -> messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, f"body -> {PARROT} -> messages -> 0 -> role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            422,
            f"body -> {PARROT} -> messages -> 0 -> content -> 0 -> type",
        ),
        ({"stop": ["a", "b", "c", "d", "e"]}, 422, f"body -> {PARROT} -> stop"),
        ({"stop": "a" * 1001}, 422, f"body -> {PARROT} -> stop"),
        ({"max_tokens": 0}, 422, f"body -> {PARROT} -> max_tokens"),
        ({"max_tokens": 2**62}, 422, f"body -> {PARROT} -> max_tokens"),
        ({"messages": QUESTION * 10_000}, 400, "INPUT_TOKEN_LIMIT_EXCEEDED"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            400,
            "INPUT_INVALID",
        ),
        ({"response_format": {"type": "json_schema"}}, 422, f"body -> {PARROT} -> response_format"),
        ({"max_tokens": 4090}, 400, "INPUT_TOKEN_LIMIT_EXCEEDED"),
        ({"model": MODEL}, 400, "INPUT_MODEL_NOT_FOUND"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,x"}]}]},
            400,
            "INPUT_INVALID",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(api: Api, fields: dict[str, Any], status: int, field: str, stream: bool) -> None:
    answer = api.post(
        {"model": PARROT, "messages": QUESTION, "stream": stream, **fields}, "/v1/chat/completions"
    )
    found, code = answer.error()
    assert found == status
    assert field in (code, *(error["field"] for error in answer.json.get("errors", ())))


def test_unknown_and_idle_fields_are_taken(api: Api) -> None:
    idle = {"user": "me", "n": 1, "tools": [], "logit_bias": {}, "metadata": {"a": "b"}, "top_p": None}
    assert ask(api, **idle).json["choices"][0]["message"]["content"] == SAID


def test_openai_sdk(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=PARROT, messages=QUESTION, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == SAID
    content = whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content) == SAID.encode()
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)
    stream = client.chat.completions.create(model=PARROT, messages=QUESTION, stream=True, stop="you")  # type: ignore[call-overload]
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == SAID.removesuffix("you!")
    assert parts[-1].finish_reason == "stop"
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}  # fmt: skip # noqa: E501
    held = client.chat.completions.create(  # type: ignore[call-overload]
        model=RANDOM,
        messages=QUESTION,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert set(json.loads(held.choices[0].message.content)) == {"ok"}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="nobody", messages=QUESTION)  # type: ignore[call-overload]


def test_typed_grpc(api: Api) -> None:
    picture = common_pb2.ContentPart(image=common_pb2.Media(data=photograph("china.jpg")))
    parts = [picture, common_pb2.ContentPart(text="hello?")]
    messages = [
        chat_pb2.ChatMessage(role="system", parts=[common_pb2.ContentPart(text="hello world")]),
        chat_pb2.ChatMessage(role="user", parts=parts),
    ]
    metadata = tuple(api.authorization.items())
    with grpc.insecure_channel(f"127.0.0.1:{api.stack.grpc_port}") as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        options = chat_pb2.ChatOptions(max_tokens=8, top_logprobs=1)
        request = chat_pb2.ChatRequest(model=RANDOM, messages=messages, options=options)
        whole = stub.Complete(request, metadata=metadata)
        chunks = list(stub.CompleteStream(request, metadata=metadata))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert whole.text == ask(api, RANDOM, SEEN, max_tokens=8).json["choices"][0]["message"]["content"]
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]
        assert chunks[-1].usage == whole.usage
        assert len(whole.logprobs) == whole.usage.output_tokens
        bad = chat_pb2.ChatRequest(model=PARROT, messages=[chat_pb2.ChatMessage(role="tool")])
        with pytest.raises(grpc.RpcError) as caught:
            stub.Complete(bad, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert "messages[0].role" in caught.value.details()  # type: ignore[attr-defined]


def test_clients_that_go_away_end_their_answers(api: Api) -> None:
    def go_away(_: int) -> None:
        body = {"model": ENDLESS, "messages": QUESTION, "stream": True, "max_tokens": 4000}
        with httpx.stream(
            "POST", f"{api.stack.url}/v1/chat/completions", json=body, headers=api.authorization, timeout=60
        ) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            assert "role" in next(lines)
            next(lines)

    # Of more the last would find no room in the cache, and be refused.
    with ThreadPoolExecutor(8) as clients:
        assert len(list(clients.map(go_away, range(50)))) == 50
    # The vectors of other calls come meanwhile, and the model answers on.
    assert api.embed("hello").status == 200
    answer = ask(api, ENDLESS, max_tokens=8).json
    assert answer["choices"][0]["message"]["content"] == f"<{FOR_EVER}"
    assert answer["choices"][0]["finish_reason"] == "length"
    until = time.monotonic() + 60
    while (held := _gauges(api, "searchfoundation_cache_blocks_used{")) != {"0.0"}:
        assert held
        assert time.monotonic() < until
        time.sleep(0.05)
    assert _gauges(api, "searchfoundation_generation_running") == {"0.0"}


def _gauges(api: Api, name: str) -> set[str]:
    _, page = http_get(api.stack.services[0].metrics_port, "/metrics")
    return {line.rpartition(" ")[2] for line in page.decode().splitlines() if line.startswith(name)}


def test_a_schema_of_a_typed_call_that_is_no_json_is_the_callers_error(api: Api) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{api.stack.grpc_port}") as channel:
        message = chat_pb2.ChatMessage(role="user", parts=[common_pb2.ContentPart(text="hello")])
        for schema in ("[" * 100_000, '{"a":' * 5_000, "1"):
            options = chat_pb2.ChatOptions(json_schema=schema)
            request = chat_pb2.ChatRequest(model=PARROT, messages=[message], options=options)
            with pytest.raises(grpc.RpcError) as caught:
                chat_pb2_grpc.ChatServiceStub(channel).Complete(
                    request, metadata=tuple(api.authorization.items())
                )
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_python_door(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SF_CATALOG_FILE", str(folder / "catalog.yaml"))
    monkeypatch.setenv("SF_CHAT_CACHE_BYTES", str(CACHE_BYTES))
    with load(PARROT, model_dir=folder, dtype="float32") as model:
        assert model.chat("hello") == SAID
        assert model.chat(QUESTION, stop="é") == "Hi 🎉"
        assert "".join(model.chat_stream("hello", images=[photograph("china.jpg")])) == SAID
        pieces = model.chat_stream("hello")
        assert next(pieces) == "H"
        pieces.close()  # type: ignore[attr-defined]
        with pytest.raises(ModelError, match="temperature"):
            model.chat("hello", temperature=3)


def test_command(api: Api, tmp_path: Path) -> None:
    picture = tmp_path / "china.jpg"
    picture.write_bytes(photograph("china.jpg"))
    words = [sys.executable, "-m", "search_foundation.cli", "chat", "--url", api.stack.url, "--model", PARROT]
    environment = {**os.environ, "API_KEY": api.key, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [*words, "--image", str(picture), "what is this?"], env=environment, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout.decode()) == (0, f"{SAID}\n")
    done = subprocess.run(words, env=environment, capture_output=True, timeout=120, input=b"one\n\ntwo\n")
    assert done.stdout.decode().splitlines() == [SAID, SAID]
    done = subprocess.run(
        [*words, "x"], env={**environment, "API_KEY": "?"}, capture_output=True, timeout=120
    )
    assert done.returncode == 1
    assert b"API key" in done.stderr

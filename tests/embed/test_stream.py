"""EmbedStream: order, bounded memory, errors of single messages, callers who leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2
from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.embed.grpc import EmbedStream, EmbedStreamLimits
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from tests.embed.conftest import Rig
from tests.rig import ALIAS, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

MINILM = "all-MiniLM-L6-v2"
WORDS = ["river", "stone", "light", "bread", "glass", "north", "paper"]
Responses = list[embed_pb2.EmbedStreamResponse]


def message(text: str, **fields: Any) -> embed_pb2.EmbedStreamRequest:
    return embed_pb2.EmbedStreamRequest(input=common_pb2.Content(text=text), **fields)


async def each(items: Iterable[embed_pb2.EmbedStreamRequest]) -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
    for item in items:
        yield item


async def send(rig: Rig, *messages: embed_pb2.EmbedStreamRequest) -> Responses:
    return [response async for response in rig.typed.EmbedStream(each(messages))]


def numbers(response: embed_pb2.EmbedStreamResponse) -> np.ndarray:
    assert response.WhichOneof("outcome") == "result"
    return np.array(response.result.embeddings[0].dense.values, np.float32)


def stream_of(rig: Rig, call: Call | None = None, **limits: Any) -> EmbedStream:
    """The stream behind the server, without a wire that buffers."""
    parser = RequestParser(rig.catalog, rig.engine.served, max_items=64)
    bounds = EmbedStreamLimits(**{"messages": 8, "size": 1 << 20, "timeout": 60.0, **limits})
    return EmbedStream(parser, Embedder(rig.engine, settings()), call or Call("test"), bounds)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
async def test_thousands_of_messages_in_order(rig: Rig, count: int) -> None:
    kinds = 500
    texts = [" ".join(WORDS[: 1 + kind % 7]) + f" {kind}" for kind in range(kinds)]
    expected: dict[int, np.ndarray] = {}
    messages = (
        message(texts[n * 7 % kinds], id=f"m{n}", model=MINILM if n == 0 else "") for n in range(count)
    )
    received = 0
    async for response in rig.typed.EmbedStream(each(messages)):
        assert (response.index, response.id) == (received, f"m{received}")
        got = numbers(response)
        kind = received * 7 % kinds
        assert float(got @ expected.setdefault(kind, got)) > 0.9999
        received += 1
    assert received == count
    pairs = [expected[kind] @ expected[(kind + 7) % kinds] for kind in range(kinds)]
    assert max(pairs) < 0.9999, "neighbours in the stream must differ, or their order would not show"


async def test_a_stream_agrees_with_a_single_call(rig: Rig) -> None:
    (response,) = await send(rig, message("hello world", model=MINILM, id="x"))
    assert numbers(response)[:5] == pytest.approx([-0.034478, 0.03102, 0.00673, 0.02611, -0.039362], abs=1e-4)
    assert response.result.model == MINILM
    assert response.result.usage.total_tokens == 4
    assert response.result.timings.inference.ToNanoseconds() > 0
    assert rig.access.charged == [4]


@pytest.mark.parametrize(("taken", "limits", "most"), [(0, {}, 9), (5, {}, 14), (5, {"size": 2500}, 8)])
async def test_no_more_is_read_than_the_window_holds(
    rig: Rig, taken: int, limits: dict[str, int], most: int
) -> None:
    read = 0

    async def endless() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        nonlocal read
        while True:
            read += 1
            yield message("stone " * 170, model=MINILM)  # 1,020 characters

    stream = stream_of(rig, **limits)
    responses = stream.run(endless())
    first = asyncio.ensure_future(anext(responses))
    for _ in range(taken):
        await first
        first = asyncio.ensure_future(anext(responses))
    await first
    for _ in range(1000):  # let the reader do what it can
        await asyncio.sleep(0)
    assert read <= most + 1
    await responses.aclose()


async def test_a_caller_who_does_not_listen_is_not_read_on(rig: Rig) -> None:
    """The same through the wire, whose own buffers hold some messages."""
    sent = 0

    async def many() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        nonlocal sent
        options = embed_pb2.EmbedOptions(truncate=True)
        for _ in range(10_000):
            sent += 1
            yield message("stone " * 2000, model=MINILM, options=options)

    call = rig.typed.EmbedStream(many())
    await call.read()
    before = -1
    while sent != before:
        before = sent
        await asyncio.sleep(2.0)
    assert sent < 5000  # of 10,000; how much the wire holds varies
    call.cancel()


async def test_one_bad_message_is_answered_and_the_rest_goes_on(rig: Rig) -> None:
    image = embed_pb2.EmbedStreamRequest(
        id="image", input=common_pb2.Content(image=common_pb2.Media(data=b"x"))
    )
    responses = await send(
        rig,
        message("a", id="good", model=MINILM),
        image,
        embed_pb2.EmbedStreamRequest(id="nothing"),
        message("word " * 5000, id="long"),
        message("a", id="wide", options=embed_pb2.EmbedOptions(dimensions=500)),
        message("a", id="stranger", model="no-such-model"),
        message("a", id="last", model=MINILM),
    )
    assert [response.id for response in responses] == [
        "good", "image", "nothing", "long", "wide", "stranger", "last"
    ]  # fmt: skip
    assert [response.index for response in responses] == list(range(7))
    assert np.array_equal(numbers(responses[0]), numbers(responses[6]))
    reasons = [
        (_detail(r, error_details_pb2.ErrorInfo).reason, r.error.code == code_pb2.INVALID_ARGUMENT)
        for r in responses[1:6]
    ]
    assert reasons == [
        ("VALIDATION_ERROR", True), ("VALIDATION_ERROR", True), ("INPUT_TOKEN_LIMIT_EXCEEDED", True),
        ("VALIDATION_ERROR", True), ("INPUT_MODEL_NOT_FOUND", True),
    ]  # fmt: skip
    fields = [
        _detail(responses[n], error_details_pb2.BadRequest).field_violations[0].field for n in (1, 2, 4)
    ]
    assert fields == ["input", "input.text", "options.dimensions"]


async def test_model_and_options_hold_until_changed(rig: Rig) -> None:
    short = embed_pb2.EmbedOptions(dimensions=8)
    responses = await send(
        rig,
        message("a", model=MINILM, options=short),
        message("a"),
        message("a", options=embed_pb2.EmbedOptions(dimensions=9)),
        message("a"),
        message("a", model=ALIAS),
        message("a"),
    )
    assert [len(numbers(response)) for response in responses] == [8, 8, 9, 9, 384, 384]
    assert [response.result.model for response in responses] == [MINILM] * 4 + [ALIAS] * 2


async def test_the_first_message_names_a_model(rig: Rig) -> None:
    first, second = await send(rig, message("a"), message("a", model=MINILM))
    assert _detail(first, error_details_pb2.BadRequest).field_violations[0].field == "model"
    assert second.WhichOneof("outcome") == "result"


async def test_an_empty_stream(rig: Rig) -> None:
    assert await send(rig) == []


async def test_a_limit_of_the_key_fails_its_message(rig: Rig) -> None:
    rig.access.refuse = ServiceError(ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED, retry_after=2.5, current=3, limit=3)
    (response,) = await send(rig, message("a", model=MINILM))
    assert response.error.code == code_pb2.RESOURCE_EXHAUSTED
    assert _detail(response, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2500


async def test_without_a_deadline_each_message_has_one(rig: Rig) -> None:
    responses = [r async for r in stream_of(rig, timeout=1e-9).run(each([message("a", model=MINILM)] * 2))]
    assert [response.error.code for response in responses] == [code_pb2.DEADLINE_EXCEEDED] * 2


async def test_an_unexpected_failure_is_logged_and_told_without_internals(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_tokens: int) -> None:
        raise RuntimeError("secret of the house")

    call = Call("request-7", charge=broken)
    with caplog.at_level(logging.ERROR):
        responses = [r async for r in stream_of(rig, call).run(each([message("a", model=MINILM)]))]
    assert responses[0].error.code == code_pb2.INTERNAL
    assert "secret" not in str(responses[0])
    assert "secret of the house" in caplog.text


async def test_the_whole_call_is_counted(rig: Rig) -> None:
    call = Call("test")
    messages = [message("hello world", model=MINILM)] * 3
    assert len([r async for r in stream_of(rig, call).run(each(messages))]) == 3
    assert (call.model, call.usage_tokens) == (MINILM, 12)
    assert call.timings.inference > 0


async def test_bytes_that_are_no_message_end_the_call(rig: Rig) -> None:
    raw = rig.channel.stream_stream("/searchfoundation.v1.EmbedService/EmbedStream")
    good = message("a", model=MINILM).SerializeToString()
    answers: list[bytes] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for answer in raw(each_bytes([good, b"\xff\xff"])):
            answers.append(answer)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(answers) == 1


async def each_bytes(items: list[bytes]) -> AsyncIterator[bytes]:
    for item in items:
        yield item


@pytest.mark.parametrize("leave", [lambda call: call.cancel(), lambda call: None])
async def test_nothing_stays_behind_when_the_caller_leaves(rig: Rig, leave: Callable[[Any], None]) -> None:
    before = asyncio.all_tasks()
    call = rig.typed.EmbedStream(each(message("bread " * 80, model=MINILM) for _ in range(500)), timeout=1.0)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await call.read()
        leave(call)
        while await call.read() is not grpc.aio.EOF:
            pass
        await call
    for _ in range(200):
        left = {task for task in asyncio.all_tasks() - before if "EmbedStream" in repr(task)}
        if not left:
            break
        await asyncio.sleep(0.01)
    assert not left
    assert len(await send(rig, message("a", model=MINILM))) == 1


def _detail(response: embed_pb2.EmbedStreamResponse, kind: type[Any]) -> Any:
    for detail in response.error.details:
        if detail.Is(kind.DESCRIPTOR):
            found = kind()
            detail.Unpack(found)
            return found
    raise AssertionError(f"no {kind.__name__} in {response}")

"""What passes the pipeline when all is well."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.wrappers_pb2 import StringValue

from services.core.call import Call, current_call
from tests.serving.probe import failure, reason, running, trailers


async def _messages(*values: str):
    for value in values:
        yield StringValue(value=value)


async def test_all_four_kinds_of_method_answer() -> None:
    async with running() as house:
        assert (await house.unary("one")).value == "one"
        down = house.streaming("Down")(StringValue(value="abc"))
        assert [answer.value async for answer in down] == ["a", "b", "c"]
        assert (await house.streaming("Up")(_messages("x", "y", "z"))).value == "xyz"
        both = house.streaming("Both")(_messages("p", "q"))
        assert [answer.value async for answer in both] == ["p", "q"]


async def test_ten_thousand_messages_of_a_stream_keep_their_order() -> None:
    async with running() as house:
        both = house.streaming("Both")(_messages(*map(str, range(10_000))))
        assert [answer.value async for answer in both] == list(map(str, range(10_000)))


async def test_a_stream_answers_before_its_requests_end() -> None:
    async with running() as house:
        call = house.streaming("Both")()
        for value in ("a", "b"):
            await call.write(StringValue(value=value))
            assert (await call.read()).value == value
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_sane_request_id_is_passed_on_and_another_is_replaced() -> None:
    async with running() as house:
        call = house.unary(metadata=(("x-request-id", "abc-1.2:3_4"),))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1.2:3_4"
        for strange in ("", "a b", "x" * 129, '"};'):
            call = house.unary(metadata=(("x-request-id", strange),))
            await call
            assert re.fullmatch("[0-9a-f]{32}", dict(await call.trailing_metadata())["x-request-id"])
        assert house.probe.calls[0].request_id == "abc-1.2:3_4"


async def test_rest_answers_carry_their_headers_first() -> None:
    async def act(call: Call, request: Any) -> Any:
        call.timings.tokenize, call.timings.queue, call.timings.inference = 0.001, 0.0025, 0.01
        return {"b": 1, "a": request["x"]}

    async with running(act) as house:
        call = house.rest(b'{"x": 2}', metadata=(("x-request-id", "r1"),))
        headers = dict(await call.initial_metadata())
        answer = await call
    assert (answer.content_type, answer.data) == ("application/json", b'{"b":1,"a":2}')
    assert headers["x-request-id"] == "r1"
    assert headers["x-ratelimit-remaining-requests"].isdigit()
    assert headers["x-ratelimit-remaining-tokens"].isdigit()
    assert headers["server-timing"].startswith(
        "tokenize;dur=1.00, queue;dur=2.50, inference;dur=10.00, total;dur="
    )


async def test_typed_answers_carry_timings_in_trailing_metadata() -> None:
    async with running() as house:
        call = house.unary()
        await call
        metadata = dict(await call.trailing_metadata())
        assert "inference;dur=" in metadata["server-timing"]
        assert "x-ratelimit-remaining-requests" in metadata


async def test_a_stream_of_rest_bodies_has_its_headers_before_its_first_body() -> None:
    async def act(call: Call, request: Any) -> Any:
        call.headers = (("location", "/there"),)
        return request

    async with running(act) as house:
        method = house.channel.unary_stream(
            "/probe.ProbeRestService/Events",
            request_serializer=HttpBody.SerializeToString,
            response_deserializer=HttpBody.FromString,
        )
        call = method(HttpBody(data=b'{"events": [1, 2]}'), metadata=(("x-request-id", "r2"),))
        headers = dict(await call.initial_metadata())
        assert (headers["x-request-id"], headers["location"]) == ("r2", "/there")
        assert [orjson.loads(body.data) async for body in call] == [1, 2]
        assert "server-timing" in dict(await call.trailing_metadata())


async def test_the_call_is_in_the_context_variable_and_knows_its_deadline() -> None:
    seen: list[Call] = []

    async def act(call: Call, request: Any) -> Any:
        assert current_call.get() is call
        seen.append(call)
        return request

    async with running(act, request_timeout_seconds=30) as house:
        await house.unary()
        await house.unary(timeout=1000)
        await anext(aiter(house.streaming("Both")(_messages("a"))))
    default, own, stream = seen
    assert default.deadline is not None
    assert default.deadline - default.started == pytest.approx(30)
    assert own.deadline is not None
    assert 900 < own.deadline - own.started < 1010, "gRPC rounds deadlines"
    assert stream.deadline is None, "a stream has no deadline but its caller's"


async def test_a_cancelled_call_cancels_its_work() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def act(_call: Call, _request: Any) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(act) as house:
        call = house.unary()
        await begun.wait()
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 100)


async def test_a_caller_that_goes_away_cancels_its_stream() -> None:
    waits, cancelled = asyncio.Event(), asyncio.Event()

    async def act(_call: Call, request: Any) -> Any:
        if request.value == "wait":
            waits.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return request

    async with running(act) as house:
        async with grpc.aio.insecure_channel(house.server.address) as channel:
            house.channel, keep = channel, house.channel
            call = house.streaming("Both")()
            await call.write(StringValue(value="a"))
            assert (await call.read()).value == "a"
            await call.write(StringValue(value="wait"))
            await asyncio.wait_for(waits.wait(), 100)
            house.channel = keep
        await asyncio.wait_for(cancelled.wait(), 100)
        assert (await house.unary("still here")).value == "still here"


async def test_calls_beyond_the_limit_are_refused_at_once() -> None:
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    async def act(_call: Call, request: Any) -> Any:
        entered.release()
        await leave.wait()
        return request

    async with running(act, max_concurrent_calls=2) as house:
        inside = [asyncio.ensure_future(house.unary(str(number))) for number in range(2)]
        for _ in inside:
            await entered.acquire()
        refused = await failure(house.unary())
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(refused) == "SERVICE_UNAVAILABLE"
        assert trailers(refused)["retry-after"] == "1"
        leave.set()
        assert [(await call).value for call in inside] == ["0", "1"]
        assert (await house.unary("after")).value == "after"


async def test_a_large_body_is_taken_and_a_larger_one_refused() -> None:
    async def act(_call: Call, request: Any) -> Any:
        return len(request["x"])

    async with running(act, max_body_bytes=6 << 20) as house:
        text = "x" * (6 << 20)
        await house.rest(orjson.dumps({"x": text[:-100]}))
        over = await failure(house.rest(orjson.dumps({"x": text[:2000] + text})))
        assert over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(over) == "INPUT_TOO_LARGE"
        assert over.details() == "Request body exceeds the maximum of 6291456 bytes."
        far_over = await failure(house.rest(orjson.dumps({"x": text + text})))
        assert far_over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "gRPC's own refusal, before it is read"
        assert len(house.probe.calls) == 1, "the larger body never reached the capability"

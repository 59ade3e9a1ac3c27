"""Keys and limits in front of every call, by the real access control."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.api.httpbody_pb2 import HttpBody

from services.core.access.keys import digest, new_key
from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from tests.serving.probe import echo, failure, reason, running, trailers

KEY = new_key()
TIERS = json.loads('{"narrow": {"requests_per_minute": 3, "tokens_per_minute": 10, "concurrency": 1}}')


@pytest.fixture
def keyed(tmp_path: Path) -> dict[str, Any]:
    """Settings with one key, of a tier that is soon used up."""
    path = tmp_path / "keys.yaml"
    entry = {"id": "team-a", "digest": f"sha256:{digest(KEY).hex()}", "tier": "narrow"}
    path.write_text(json.dumps({"keys": [entry]}))
    return {"auth": True, "keys_file": path, "tiers": TIERS}


def bearer(key: str = KEY) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ((), "AUTH_MISSING_API_KEY"),
        ((("authorization", ""),), "AUTH_MISSING_API_KEY"),
        ((("authorization", "Bearer "),), "AUTH_INVALID_FORMAT"),
        ((("authorization", f"Basic {KEY}"),), "AUTH_INVALID_FORMAT"),
        (bearer(new_key()), "AUTH_INVALID_API_KEY"),
    ],
)
async def test_calls_without_a_good_key_are_refused(
    keyed: dict[str, Any], metadata: tuple[tuple[str, str], ...], code: str
) -> None:
    async with running(**keyed) as house:
        for path in ("/probe.Probe/Unary", "/probe.Probe/Both", "/probe.ProbeRestService/Do"):
            error = await failure(house.channel.unary_unary(path)(b"", metadata=metadata))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert reason(error) == code
        assert house.probe.calls == []


async def test_a_call_is_refused_before_its_body_is_read(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as house:
        call = house.channel.stream_unary("/probe.ProbeRestService/Do")()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_reflection_need_no_key(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as house:
        await house.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        reflect = house.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
        await reflect.write(b"\x3a\x00")
        assert b"probe.Probe" in await reflect.read()
        await reflect.done_writing()


async def test_the_call_knows_its_key_and_tier(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as house:
        await house.unary(metadata=bearer())
    call = house.probe.calls[0]
    assert (call.key_id, call.tier) == ("team-a", "narrow")


async def test_answers_tell_what_is_left_and_the_fourth_request_is_too_many(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as house:
        left = []
        for _ in range(3):
            call = house.rest(b"{}", metadata=bearer())
            await call
            headers = dict(await call.initial_metadata())
            left.append((headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-remaining-tokens"]))
        assert left == [("2", "9"), ("1", "8"), ("0", "7")]
        error = await failure(house.rest(b"{}", metadata=bearer()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers(error)["x-ratelimit-remaining-requests"] == "0"
    assert int(trailers(error)["retry-after"]) >= 1
    assert reason(error) == "RATE_REQUEST_LIMIT_EXCEEDED"


async def test_tokens_are_refused_by_the_work_itself(keyed: dict[str, Any]) -> None:
    async def greedy(call: Call, request: Any) -> Any:
        await call.charge(11)
        return request

    async with running(greedy, **keyed) as house:
        error = await failure(house.rest(b"{}", metadata=bearer()))
    assert reason(error) == "RATE_TOKEN_LIMIT_EXCEEDED"
    assert trailers(error)["x-ratelimit-remaining-tokens"] == "10"
    assert "retry-after" in trailers(error)


@pytest.mark.parametrize("end", ["answer", "error", "cancel", "deadline"])
async def test_the_concurrency_slot_comes_back_however_a_call_ends(keyed: dict[str, Any], end: str) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(_call: Call, request: Any) -> Any:
        entered.set()
        await leave.wait()
        if end == "error":
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="No.")
        return request

    async with running(slow, **keyed) as house:
        timeout = 0.2 if end == "deadline" else None
        first = asyncio.ensure_future(house.unary(metadata=bearer(), timeout=timeout))
        await entered.wait()
        busy = await failure(house.unary(metadata=bearer()))
        assert reason(busy) == "RATE_CONCURRENCY_LIMIT_EXCEEDED"
        if end == "cancel":
            first.cancel()
        elif end != "deadline":
            leave.set()
        await asyncio.wait((first,))
        house.probe.act = echo
        await _until_admitted(house)


async def _until_admitted(house: Any) -> None:
    """The server learns of a cancelled call a moment after its caller has given up."""
    for _ in range(100):
        try:
            await house.unary(metadata=bearer())
        except grpc.aio.AioRpcError as error:
            code = reason(error)
            if code == "RATE_REQUEST_LIMIT_EXCEEDED":
                return  # let in as far as concurrency goes; this tier has few requests
            assert code == "RATE_CONCURRENCY_LIMIT_EXCEEDED"
            await asyncio.sleep(0.02)
        else:
            return
    raise AssertionError("the slot did not come back")


@pytest.mark.parametrize(
    ("metadata", "refused"),
    [
        ((("x-envoy-external-address", "10.0.0.2"), ("x-forwarded-for", "10.0.0.1")), False),
        ((("x-forwarded-for", "10.0.0.2, 10.0.0.1"),), True),
        ((("x-forwarded-for", "10.0.0.1, 10.0.0.2"),), False),
        ((), False),
    ],
)
async def test_limits_by_address_take_the_address_the_gateway_saw(
    metadata: tuple[tuple[str, str], ...], refused: bool
) -> None:
    async with running(ip_requests_per_minute=1, trusted_proxies=("127.0.0.0/8",)) as house:
        await house.unary(metadata=(("x-forwarded-for", "10.0.0.1"),))
        call = house.unary(metadata=metadata)
        if refused:
            error = await failure(call)
            assert reason(error) == "RATE_IP_LIMIT_EXCEEDED"
        else:
            await call


@pytest.mark.parametrize("header", ["x-envoy-external-address", "x-forwarded-for"])
@pytest.mark.parametrize("proxies", [(), ("10.0.0.0/8", "::1/128")])
async def test_nobody_elses_word_for_an_address_is_believed(header: str, proxies: tuple[str, ...]) -> None:
    async with running(ip_requests_per_minute=2, trusted_proxies=proxies) as house:
        for last in (1, 2):
            await house.unary(metadata=((header, f"10.0.0.{last}"),))
        error = await failure(house.unary(metadata=((header, "10.0.0.3"),)))
        assert reason(error) == "RATE_IP_LIMIT_EXCEEDED"


async def test_two_keys_in_one_call_are_no_key(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as house:
        await house.unary(metadata=bearer())
        for both in (bearer() * 2, (*bearer(new_key()), *bearer())):
            assert reason(await failure(house.unary(metadata=both))) == "AUTH_INVALID_FORMAT"


async def test_a_callers_own_address_counts_without_a_gateway() -> None:
    async with running(ip_requests_per_minute=1) as house:
        await house.unary()
        async with grpc.aio.insecure_channel(house.server.address) as second:
            error = await failure(second.unary_unary("/probe.Probe/Unary")(b""))
        assert reason(error) == "RATE_IP_LIMIT_EXCEEDED"


async def test_the_key_is_in_no_log(keyed: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    async def broken(_call: Call, _request: HttpBody) -> Any:
        raise RuntimeError("broken")

    async with running(broken, access_log=True, **keyed) as house:
        await failure(house.rest(b"{}", metadata=bearer()))
        await failure(house.rest(b"{}", metadata=bearer(new_key())))
        await house.stop()
    assert KEY not in capfd.readouterr().err

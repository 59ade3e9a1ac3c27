"""What every limiter does, over both: in process and in Redis."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator

import pytest

from services.core.access.limits import NO_LIMIT, Lease, Limiter
from services.core.access.local_limits import MAX_ADDRESSES, LocalLimiter
from services.core.access.principal import KeyLimits
from services.core.access.shared_limits import SharedLimiter, connect
from services.core.errors import ErrorCode, ServiceError
from tests.access.clock import HandClock
from tests.servers import shared_redis


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest, clock: HandClock) -> AsyncIterator[Limiter]:
    if request.param == "local":
        yield LocalLimiter(clock.now)
        return
    client = connect(shared_redis().url, 5.0)
    shared = SharedLimiter(client, LocalLimiter(clock.now), timeout=5.0, now_ms=clock.now_ms)
    yield shared
    await shared.close()


@pytest.fixture
def key() -> str:
    """A key no other test counts."""
    return f"key_{secrets.token_hex(8)}"


def limits(
    requests: int | None = None, tokens: int | None = None, concurrency: int | None = None
) -> KeyLimits:
    return KeyLimits(requests, tokens, concurrency)


async def refused(limiter: Limiter, key: str, limit: KeyLimits) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        await limiter.admit(key, limit)
    return error.value


async def test_requests_per_minute(limiter: Limiter, key: str, clock: HandClock) -> None:
    limit = limits(requests=3)
    left = [(await limiter.admit(key, limit)).remaining_requests for _ in range(3)]
    assert left == [2, 1, 0]
    clock.forward(20)
    error = await refused(limiter, key, limit)
    assert error.code is ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED
    assert error.detail.startswith("Request rate limit exceeded: 4/3 requests per minute.")
    assert error.headers == {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-remaining-tokens": str(NO_LIMIT),
    }
    assert error.retry_after == 41.0
    clock.forward(error.retry_after)
    assert (await limiter.admit(key, limit)).remaining_requests == 2


async def test_refused_requests_are_not_counted(limiter: Limiter, key: str, clock: HandClock) -> None:
    limit = limits(requests=1)
    await limiter.admit(key, limit)
    for _ in range(50):
        clock.forward(1)
        await refused(limiter, key, limit)
    clock.forward(11)
    await limiter.admit(key, limit)


async def test_the_window_slides(limiter: Limiter, key: str, clock: HandClock) -> None:
    limit = limits(requests=2)
    await limiter.admit(key, limit)
    clock.forward(50)
    await limiter.admit(key, limit)
    clock.forward(10.1)
    # The first has left the minute, the second has not.
    await limiter.admit(key, limit)
    assert (await refused(limiter, key, limit)).retry_after == 50.0
    clock.forward(49.8)
    await refused(limiter, key, limit)
    clock.forward(0.2)
    await limiter.admit(key, limit)


async def test_no_minute_ever_holds_more_than_the_limit(limiter: Limiter, key: str, clock: HandClock) -> None:
    steps = random.Random(7)
    passed: list[float] = []
    refusals = 0
    for _ in range(600):
        clock.forward(steps.choice([0.0, 0.01, 0.3, 1.7, 9.0]))
        within = sum(moment > clock.now() - 60 for moment in passed)
        try:
            await limiter.admit(key, limits(requests=20))
        except ServiceError:
            refusals += 1
            # Nor is it stricter than the limit by more than a slot.
            assert sum(moment > clock.now() - 60.1 for moment in passed) == 20
        else:
            assert within < 20
            passed.append(clock.now())
    assert refusals > 0


async def test_a_client_that_keeps_pace_is_never_refused(
    limiter: Limiter, key: str, clock: HandClock
) -> None:
    for _ in range(200):
        await limiter.admit(key, limits(requests=60))
        clock.forward(1.002)


async def test_tokens_per_minute(limiter: Limiter, key: str, clock: HandClock) -> None:
    limit = limits(tokens=1_000)
    lease = await limiter.admit(key, limit)
    assert lease.remaining_tokens == 1_000
    await limiter.charge(lease, 600)
    clock.forward(30)
    await limiter.charge(lease, 300)
    assert lease.remaining_tokens == 100
    with pytest.raises(ServiceError) as error:
        await limiter.charge(lease, 101)
    assert error.value.code is ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED
    assert error.value.detail.startswith("Token rate limit exceeded: 1,001/1,000 tokens per minute.")
    assert error.value.retry_after == 31.0
    assert error.value.headers["x-ratelimit-remaining-tokens"] == "100"
    clock.forward(31)
    await limiter.charge(lease, 101)
    assert lease.remaining_tokens == 1_000 - 300 - 101
    with pytest.raises(ServiceError) as error:
        await limiter.charge(lease, 800)
    assert error.value.retry_after == 30.0


async def test_tokens_spent_refuse_the_next_request_at_once(
    limiter: Limiter, key: str, clock: HandClock
) -> None:
    limit = limits(requests=10, tokens=1_000)
    await limiter.charge(await limiter.admit(key, limit), 1_000)
    error = await refused(limiter, key, limit)
    assert error.code is ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED
    assert error.headers["x-ratelimit-remaining-requests"] == "9"


async def test_more_tokens_than_the_limit_never_pass(limiter: Limiter, key: str) -> None:
    lease = await limiter.admit(key, limits(tokens=10))
    with pytest.raises(ServiceError) as error:
        await limiter.charge(lease, 11)
    assert error.value.retry_after == 60.0
    await limiter.charge(lease, 10)


async def test_concurrency(limiter: Limiter, key: str) -> None:
    limit = limits(requests=100, concurrency=2)
    first, second = await limiter.admit(key, limit), await limiter.admit(key, limit)
    error = await refused(limiter, key, limit)
    assert error.code is ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED
    assert error.detail.startswith("Concurrency limit exceeded: 3/2 concurrent requests.")
    assert error.retry_after == 1.0
    await limiter.release(first)
    third = await limiter.admit(key, limit)
    assert third.remaining_requests == 97, "the refused request was not counted"
    await refused(limiter, key, limit)
    for lease in (second, third):
        await limiter.release(lease)


async def test_keys_do_not_share(limiter: Limiter, key: str) -> None:
    limit = limits(requests=1, concurrency=1)
    await limiter.admit(key, limit)
    await limiter.admit(key + "x", limit)


async def test_nothing_limited_has_a_readable_remainder(limiter: Limiter, key: str) -> None:
    lease = await limiter.admit(key, limits(concurrency=5))
    assert (lease.remaining_requests, lease.remaining_tokens) == (NO_LIMIT, NO_LIMIT)
    await limiter.charge(lease, 10**9)
    await limiter.release(lease)


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        (limits(requests=37), ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED),
        (limits(concurrency=37), ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED),
    ],
)
async def test_200_at_once_pass_exactly_the_limit(
    limiter: Limiter, key: str, limit: KeyLimits, code: ErrorCode
) -> None:
    async def attempt() -> Lease | ErrorCode:
        try:
            return await limiter.admit(key, limit)
        except ServiceError as error:
            return error.code

    results = await asyncio.gather(*(attempt() for _ in range(200)))
    assert sum(isinstance(result, Lease) for result in results) == 37
    assert results.count(code) == 163
    for lease in results:
        if isinstance(lease, Lease):
            await limiter.release(lease)


async def test_200_charges_at_once_never_pass_the_tokens(limiter: Limiter, key: str) -> None:
    limit = limits(tokens=10_000)
    lease = await limiter.admit(key, limit)

    async def attempt() -> int:
        try:
            await limiter.charge(await limiter.admit(key, limit), 99)
        except ServiceError:
            return 0
        return 99

    assert sum(await asyncio.gather(*(attempt() for _ in range(200)))) == 9_999
    await limiter.charge(lease, 1)


async def test_addresses(limiter: Limiter, clock: HandClock) -> None:
    address = f"198.51.100.{secrets.token_hex(4)}"
    for _ in range(2):
        await limiter.count_address(address, 2)
    with pytest.raises(ServiceError) as error:
        await limiter.count_address(address, 2)
    assert error.value.code is ErrorCode.RATE_IP_LIMIT_EXCEEDED
    assert error.value.retry_after == 61.0
    await limiter.count_address(address + "1", 2)
    clock.forward(61)
    await limiter.count_address(address, 2)


async def test_a_clock_set_back_refuses_nobody_for_longer_than_a_minute(key: str, clock: HandClock) -> None:
    client = connect(shared_redis().url, 5.0)
    limiter = SharedLimiter(client, LocalLimiter(clock.now), timeout=5.0, now_ms=clock.now_ms)
    limit = limits(requests=1, tokens=10)
    await limiter.charge(await limiter.admit(key, limit), 10)
    clock.forward(-3600)
    await limiter.charge(await limiter.admit(key, limit), 10)
    await refused(limiter, key, limit)
    clock.forward(61)
    await limiter.admit(key, limit)
    await limiter.close()


async def test_invented_addresses_are_bounded(clock: HandClock) -> None:
    limiter = LocalLimiter(clock.now)
    for number in range(MAX_ADDRESSES + 1_000):
        await limiter.count_address(str(number), 1)
    assert limiter.known == MAX_ADDRESSES


async def test_what_is_idle_is_forgotten(clock: HandClock) -> None:
    limiter = LocalLimiter(clock.now)
    busy = await limiter.admit("busy", limits(concurrency=1))
    for number in range(1_000):
        await limiter.release(await limiter.admit(f"key_{number}", limits(requests=1)))
        await limiter.count_address(f"2001:db8::{number:x}", 1)
    clock.forward(61)
    await limiter.admit("new", limits(requests=1))
    assert limiter.known == 2
    await limiter.release(busy)

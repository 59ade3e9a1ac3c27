"""Redis coming and going, several processes on one Redis, and processes that die."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from prometheus_client import REGISTRY

from services.core.access.limits import Lease
from services.core.access.local_limits import LocalLimiter
from services.core.access.principal import KeyLimits
from services.core.access.shared_limits import SharedLimiter, connect
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import ConfigurationError
from tests.access.clock import until
from tests.servers import RedisServer, free_port, shared_redis

LEASE_SECONDS = 1.5

# Admits up to `wanted` calls of a key one by one, says how many passed, and holds them until it is killed.
TAKER = """
import asyncio, sys
from services.core.access.local_limits import LocalLimiter
from services.core.access.principal import KeyLimits
from services.core.access.shared_limits import SharedLimiter, connect
from services.core.errors import ServiceError

async def main(url, key, limits, wanted, lease_seconds):
    client = connect(url, 5.0)
    limiter = SharedLimiter(client, LocalLimiter(), timeout=5.0, lease_seconds=float(lease_seconds))
    passed = 0
    for _ in range(int(wanted)):
        try:
            await limiter.admit(key, KeyLimits(*eval(limits)))
        except ServiceError:
            continue
        passed += 1
    print(passed, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def make(server: RedisServer, timeout: float = 0.25, lease_seconds: float = LEASE_SECONDS) -> SharedLimiter:
    client = connect(server.url, timeout)
    return SharedLimiter(client, LocalLimiter(), timeout=timeout, lease_seconds=lease_seconds)


@pytest.fixture
async def limiter(own_redis: RedisServer) -> AsyncIterator[SharedLimiter]:
    limiter = make(own_redis)
    yield limiter
    await limiter.close()


@pytest.fixture
def key() -> str:
    return f"key_{secrets.token_hex(8)}"


def metric(name: str) -> float:
    value = REGISTRY.get_sample_value(f"searchfoundation_redis_{name}")
    assert value is not None
    return value


def shared() -> bool:
    return metric("up") == 1


def take(server: RedisServer, key: str, limits: KeyLimits, wanted: int) -> subprocess.Popen[str]:
    figures = str((limits.requests, limits.tokens, limits.concurrency))
    arguments = [server.url, key, figures, str(wanted), str(LEASE_SECONDS)]
    return subprocess.Popen([sys.executable, "-c", TAKER, *arguments], stdout=subprocess.PIPE, text=True)


def passed(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


async def test_stopped_and_started_during_traffic(
    own_redis: RedisServer, limiter: SharedLimiter, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = KeyLimits(requests=None, tokens=10**9, concurrency=1_000)
    stopping = asyncio.Event()
    calls = 0

    async def traffic() -> None:
        nonlocal calls
        while not stopping.is_set():
            lease = await limiter.admit(key, limits)
            await limiter.charge(lease, 10)
            await limiter.release(lease)
            calls += 1
            await asyncio.sleep(0.001)

    async def more_calls() -> None:
        enough = calls + 100
        await until(lambda: calls >= enough)

    errors = metric("errors_total")
    with caplog.at_level(logging.INFO, "services"):
        clients = [asyncio.create_task(traffic()) for _ in range(20)]
        await asyncio.sleep(0.2)
        for stop in (own_redis.stop, own_redis.kill):
            stop()
            await until(lambda: not shared())
            await more_calls()
            own_redis.start()
            await until(shared)
        await more_calls()
        stopping.set()
        await asyncio.gather(*clients)
    assert metric("errors_total") > errors
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    assert said == ["Redis is away", "Redis is back"] * 2
    # No slot was left behind on either side.
    leases = [await limiter.admit(key, KeyLimits(None, None, 5)) for _ in range(5)]
    assert all(lease.id is not None for lease in leases)


async def test_limits_hold_in_process_while_redis_is_away(
    own_redis: RedisServer, limiter: SharedLimiter, key: str
) -> None:
    own_redis.kill()
    await limiter.admit(key, KeyLimits(1, None, None))
    with pytest.raises(ServiceError) as error:
        await limiter.admit(key, KeyLimits(1, None, None))
    assert error.value.code is ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED
    with pytest.raises(ConnectionError):
        await limiter.ping()


async def test_calls_in_flight_across_an_outage(
    own_redis: RedisServer, limiter: SharedLimiter, key: str
) -> None:
    limits = KeyLimits(None, 1_000, 2)
    before = await limiter.admit(key, limits)
    own_redis.kill()
    await limiter.charge(before, 1_000)
    with pytest.raises(ServiceError):
        await limiter.charge(before, 1)
    during = await limiter.admit(key, KeyLimits(None, None, 2))
    own_redis.start()
    await until(shared)
    for lease in (before, during):
        await limiter.release(lease)
    for _ in range(2):
        await limiter.admit(key, limits)
    with pytest.raises(ServiceError):
        await limiter.admit(key, limits)


async def test_a_redis_that_hangs_holds_no_call_up(
    own_redis: RedisServer, limiter: SharedLimiter, key: str
) -> None:
    limits = KeyLimits(None, None, 100)
    await limiter.release(await limiter.admit(key, limits))
    own_redis.freeze()
    try:
        leases = await asyncio.gather(*(limiter.admit(key, limits) for _ in range(50)))
        assert all(lease.id is None for lease in leases)
        assert metric("up") == 0
    finally:
        own_redis.thaw()
    await until(shared)
    await limiter.ping()
    assert (await limiter.admit(key, limits)).id is not None


async def test_away_at_start(key: str, tmp_path: object) -> None:
    limiter = make(RedisServer(folder=tmp_path, port=free_port()))  # type: ignore[arg-type]
    assert (await limiter.admit(key, KeyLimits(5, None, None))).id is None
    await limiter.close()


@pytest.mark.parametrize(
    ("limits", "expected"), [(KeyLimits(30, None, None), 30), (KeyLimits(None, None, 30), 30)]
)
async def test_two_processes_share_one_limit(key: str, limits: KeyLimits, expected: int) -> None:
    takers = [take(shared_redis(), key, limits, 25) for _ in range(2)]
    try:
        assert sum(passed(taker) for taker in takers) == expected
    finally:
        for taker in takers:
            kill(taker)


async def test_a_killed_process_gives_its_slots_back(key: str) -> None:
    limits = KeyLimits(None, None, 3)
    taker = take(shared_redis(), key, limits, 3)
    assert passed(taker) == 3
    limiter = make(shared_redis(), timeout=5.0)
    with pytest.raises(ServiceError) as error:
        await limiter.admit(key, limits)
    assert error.value.code is ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED
    kill(taker)
    taken: list[Lease] = []
    while len(taken) < 3:
        try:
            taken.append(await limiter.admit(key, limits))
        except ServiceError:
            await asyncio.sleep(0.05)
    await limiter.close()


async def test_a_long_call_keeps_its_slot(key: str) -> None:
    limiter = make(shared_redis(), timeout=5.0)
    limits = KeyLimits(None, None, 1)
    lease = await limiter.admit(key, limits)
    await asyncio.sleep(2 * LEASE_SECONDS)
    with pytest.raises(ServiceError):
        await limiter.admit(key, limits)
    await limiter.release(lease)
    await limiter.admit(key, limits)
    await limiter.close()


async def test_a_cancelled_admission_leaves_no_slot(key: str) -> None:
    limiter = make(shared_redis(), timeout=5.0, lease_seconds=3600)
    limits = KeyLimits(None, None, 1)
    for _ in range(5):
        attempt = asyncio.create_task(limiter.admit(key, limits))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        await limiter.ping()
        if not attempt.cancelled():
            await limiter.release(attempt.result())
    await limiter.admit(key, limits)
    await limiter.close()


async def test_scripts_are_loaded_again_when_redis_has_forgotten_them(
    own_redis: RedisServer, limiter: SharedLimiter, key: str
) -> None:
    limits = KeyLimits(100, 100, 100)
    await limiter.admit(key, limits)
    subprocess.run(
        ["redis-cli", "-p", str(own_redis.port), "SCRIPT", "FLUSH"], check=True, capture_output=True
    )
    leases = await asyncio.gather(*(limiter.admit(key, limits) for _ in range(20)))
    assert all(lease.id is not None for lease in leases)
    assert min(lease.remaining_requests for lease in leases) == 79


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://localhost:port"])
def test_an_unusable_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SF_REDIS_URL cannot be used"):
        connect(url, 1.0)

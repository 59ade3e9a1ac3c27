"""Limits kept in Redis for several processes, and in process while Redis is away."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.core.access.limits import Lease, LimitKind, headers, refusal, remaining
from services.core.access.local_limits import LocalLimiter
from services.core.access.metrics import REDIS_ERRORS, REDIS_UP
from services.core.access.principal import KeyLimits
from services.core.access.redis_pump import FAILURES, RedisPump
from services.core.settings import ConfigurationError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
PROBE_SECONDS = 1.0

_PREFIX = "searchfoundation"


def _script(name: str) -> tuple[str, str]:
    """Read a script and give it with the SHA-1 Redis knows it by."""
    folder = resources.files("services.core.access")
    source = (folder / "window.lua").read_text() + (folder / name).read_text()
    return source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


_ADMIT, _ADMIT_SHA = _script("admit.lua")
_CHARGE, _CHARGE_SHA = _script("charge.lua")
_RENEW, _RENEW_SHA = _script("renew.lua")


def connect(url: str, timeout: float) -> Redis:
    """Make a client that fails instead of waiting; raises ``ConfigurationError`` for an unusable URL."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            max_connections=4,
        )
    except ValueError as error:
        raise ConfigurationError(f"SF_REDIS_URL cannot be used: {error}.") from None


class SharedLimiter:
    """The limiter over Redis: one round trip to admit, one to charge, none to wait for on release.

    A concurrency slot is a lease of ``lease_seconds`` that a live process renews, so a killed one's slots
    come free. While Redis is away each process keeps the limits by itself (so a key gets its limit once
    per process), counts the errors in a metric and says so once; a probe every ``PROBE_SECONDS`` finds
    out when Redis is back. ``now_ms`` replaces the clock of the Redis server, for tests.
    """

    def __init__(
        self,
        client: Redis,
        local: LocalLimiter,
        *,
        timeout: float,
        lease_seconds: float = LEASE_SECONDS,
        now_ms: Callable[[], int] | None = None,
    ) -> None:
        self._pump = RedisPump(client, (_ADMIT, _CHARGE, _RENEW), timeout)
        self._local = local
        self._lease_ms = int(lease_seconds * 1000)
        self._now_ms = now_ms
        self._up = True
        self._process = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._leases: dict[str, str] = {}
        self._failed = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep())
        REDIS_UP.set(1)

    async def admit(self, key_id: str, limits: KeyLimits) -> Lease:
        """See ``Limiter``."""
        if self._up:
            try:
                return await self._admit(key_id, limits)
            except FAILURES as error:
                self._lost(error)
        return await self._local.admit(key_id, limits)

    async def charge(self, lease: Lease, tokens: int) -> None:
        """See ``Limiter``."""
        if lease.limits.tokens is None or tokens == 0:
            return
        if self._up and lease.id is not None:
            try:
                await self._charge(lease, lease.limits.tokens, tokens)
            except FAILURES as error:
                self._lost(error)
            else:
                return
        await self._local.charge(lease, tokens)

    async def release(self, lease: Lease) -> None:
        """See ``Limiter``. While Redis is away a lease taken there is left to run out."""
        if lease.id is None:
            await self._local.release(lease)
            return
        key = self._leases.pop(lease.id, None)
        if key is not None and self._up:
            # Not waited for: commands keep their order, so the next admission here finds the slot free.
            self._pump.submit("ZREM", key, lease.id).add_done_callback(self._released)

    async def count_address(self, address: str, limit: int) -> None:
        """See ``Limiter``."""
        if self._up:
            try:
                refused, current, wait_ms, _ = await self._window(f"{_PREFIX}:address:{address}", limit, 1)
            except FAILURES as error:
                self._lost(error)
            else:
                if refused:
                    raise refusal(LimitKind.ADDRESS, current=current, limit=limit, wait_ms=wait_ms)
                return
        await self._local.count_address(address, limit)

    async def ping(self) -> None:
        """Ask Redis for a sign of life; raises ``ConnectionError``."""
        try:
            await self._pump.submit("PING")
        except FAILURES as error:
            # Readiness is open to anyone: where Redis is and what it said is for the log.
            raise ConnectionError("Redis does not answer") from error

    async def close(self) -> None:
        """Stop renewing and close the connection."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        await self._pump.close()

    async def _admit(self, key_id: str, limits: KeyLimits) -> Lease:
        lease_id = f"{self._process}:{next(self._numbers)}"
        # The braces keep a key's three entries on one node of a Redis cluster.
        requests, tokens, running = (
            f"{_PREFIX}:{{{key_id}}}:{name}" for name in ("requests", "tokens", "running")
        )
        future = self._pump.submit(
            "EVALSHA", _ADMIT_SHA, 3, requests, tokens, running, self._now(),
            _or_none(limits.requests), _or_none(limits.tokens), _or_none(limits.concurrency),
            lease_id, self._lease_ms,
        )  # fmt: skip
        try:
            kind, current, wait_ms, requests_used, tokens_used = await future
        except asyncio.CancelledError:
            # The command is on its way all the same, and nobody is left to give the slot back.
            self._pump.submit("ZREM", running, lease_id).add_done_callback(self._released)
            raise
        left = remaining(limits.requests, requests_used), remaining(limits.tokens, tokens_used)
        if kind:
            limit = (limits.requests, limits.tokens, limits.concurrency)[kind - 1]
            assert limit is not None
            raise refusal(LimitKind(kind), current=current, limit=limit, wait_ms=wait_ms, left=headers(*left))
        if limits.concurrency is not None:
            self._leases[lease_id] = running
        return Lease(key_id, limits, *left, id=lease_id)

    async def _charge(self, lease: Lease, limit: int, tokens: int) -> None:
        key = f"{_PREFIX}:{{{lease.key_id}}}:tokens"
        refused, current, wait_ms, used = await self._window(key, limit, tokens)
        lease.remaining_tokens = remaining(limit, used)
        if refused:
            left = headers(lease.remaining_requests, lease.remaining_tokens)
            raise refusal(LimitKind.TOKENS, current=current, limit=limit, wait_ms=wait_ms, left=left)

    async def _window(self, key: str, limit: int, count: int) -> tuple[int, int, int, int]:
        return await self._pump.submit("EVALSHA", _CHARGE_SHA, 1, key, self._now(), limit, count)

    def _now(self) -> str | int:
        return "" if self._now_ms is None else self._now_ms()

    def _released(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, FAILURES):
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        REDIS_ERRORS.inc()
        if self._up:
            self._up = False
            self._failed.set()
            REDIS_UP.set(0)
            logger.error("Redis is away, limits are kept in process: %s", str(error) or "timed out")

    async def _keep(self) -> None:
        """Renew the leases of calls in flight; while Redis is away, wait for it to take writes again."""
        while True:
            try:
                async with asyncio.timeout(self._lease_ms / 3000):
                    await self._failed.wait()
            except TimeoutError:
                try:
                    await self._renew()
                except FAILURES as error:
                    self._lost(error)
                continue
            await self._recover()

    async def _renew(self) -> None:
        leases: defaultdict[str, list[str]] = defaultdict(list)
        for lease_id, key in self._leases.items():
            leases[key].append(lease_id)
        renewals: list[asyncio.Future[Any]] = [
            self._pump.submit("EVALSHA", _RENEW_SHA, 1, key, self._now(), self._lease_ms, *ids)
            for key, ids in leases.items()
        ]
        await asyncio.gather(*renewals)

    async def _recover(self) -> None:
        while not self._up:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await self._pump.submit("SET", f"{_PREFIX}:probe", self._process, "PX", 1000)
            except FAILURES:
                REDIS_ERRORS.inc()
            else:
                self._up = True
                self._failed.clear()
                REDIS_UP.set(1)
                logger.info("Redis is back, limits are shared again")


def _or_none(limit: int | None) -> int:
    return -1 if limit is None else limit

"""Limits kept in this process: sliding windows of slots.

The ``limits`` package is not used: its sliding windows keep every hit or estimate from two counters, one
limit at a time, and it has no concurrency. Here one admission checks three limits before it counts
anything, a minute holds never more than the limit, and it costs a few microseconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from services.core.access.limits import (
    SLOT_MS,
    WINDOW_MS,
    Lease,
    LimitKind,
    headers,
    refusal,
    remaining,
)
from services.core.access.principal import KeyLimits

_SLOTS = WINDOW_MS // SLOT_MS
_SWEEP_MS = WINDOW_MS

MAX_ADDRESSES = 65_536
"""Remembered at a time; beyond, the one that came first is forgotten."""


class SlidingWindow:
    """Sum of the uses of the last minute, kept as (slot, count) pairs: exact to one slot, never too low."""

    __slots__ = ("_slots", "_total")

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()
        self._total = 0

    def used(self, now_ms: int) -> int:
        """Give the sum at a time, forgetting what is older than a minute."""
        slots = self._slots
        oldest = now_ms // SLOT_MS - _SLOTS
        while slots and slots[0][0] < oldest:
            self._total -= slots.popleft()[1]
        return self._total

    def add(self, now_ms: int, count: int) -> None:
        """Count a use."""
        slot = now_ms // SLOT_MS
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1][1] += count
        else:
            self._slots.append([slot, count])
        self._total += count

    def wait_ms(self, now_ms: int, excess: int) -> int:
        """Give the time until ``excess`` uses are forgotten; the whole window when there are not so many."""
        freed = 0
        for slot, count in self._slots:
            freed += count
            if freed >= excess:
                return (slot + _SLOTS + 1) * SLOT_MS - now_ms
        return WINDOW_MS


@dataclass(slots=True)
class _State:
    """What one key has in use."""

    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)
    running: int = 0

    def idle(self, now_ms: int) -> bool:
        return not (self.running or self.requests.used(now_ms) or self.tokens.used(now_ms))


class LocalLimiter:
    """The limiter of one process; no method ever waits, so each is atomic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, _State] = {}
        self._addresses: dict[str, SlidingWindow] = {}
        self._swept_ms = self._now_ms()

    @property
    def known(self) -> int:
        """How many keys and addresses are remembered."""
        return len(self._keys) + len(self._addresses)

    async def admit(self, key_id: str, limits: KeyLimits) -> Lease:
        """See ``Limiter``."""
        now_ms = self._now_ms()
        state = self._keys.get(key_id)
        if state is None:
            state = self._add_key(key_id, now_ms)
        requests = state.requests.used(now_ms) if limits.requests is not None else 0
        tokens = state.tokens.used(now_ms) if limits.tokens is not None else 0
        if (
            (limits.requests is not None and requests >= limits.requests)
            or (limits.tokens is not None and tokens >= limits.tokens)
            or (limits.concurrency is not None and state.running >= limits.concurrency)
        ):
            self._refuse(state, limits, now_ms)
        if limits.requests is not None:
            state.requests.add(now_ms, 1)
        state.running += 1
        return Lease(
            key_id, limits, remaining(limits.requests, requests + 1), remaining(limits.tokens, tokens)
        )

    async def charge(self, lease: Lease, tokens: int) -> None:
        """See ``Limiter``."""
        limit = lease.limits.tokens
        if limit is None or tokens == 0:
            return
        now_ms = self._now_ms()
        state = self._keys.get(lease.key_id)
        if state is None:
            state = self._add_key(lease.key_id, now_ms)
        used = state.tokens.used(now_ms)
        excess = used + tokens - limit
        if excess > 0:
            lease.remaining_tokens = remaining(limit, used)
            raise refusal(
                LimitKind.TOKENS,
                current=used + tokens,
                limit=limit,
                wait_ms=state.tokens.wait_ms(now_ms, excess),
                left=headers(lease.remaining_requests, lease.remaining_tokens),
            )
        state.tokens.add(now_ms, tokens)
        lease.remaining_tokens = limit - used - tokens

    async def release(self, lease: Lease) -> None:
        """See ``Limiter``."""
        self._keys[lease.key_id].running -= 1

    async def count_address(self, address: str, limit: int) -> None:
        """See ``Limiter``."""
        now_ms = self._now_ms()
        window = self._addresses.get(address)
        if window is None:
            self._sweep(now_ms)
            if len(self._addresses) >= MAX_ADDRESSES:
                del self._addresses[next(iter(self._addresses))]
            window = self._addresses[address] = SlidingWindow()
        used = window.used(now_ms)
        if used >= limit:
            wait_ms = window.wait_ms(now_ms, used + 1 - limit)
            raise refusal(LimitKind.ADDRESS, current=used + 1, limit=limit, wait_ms=wait_ms)
        window.add(now_ms, 1)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _refuse(self, state: _State, limits: KeyLimits, now_ms: int) -> None:
        requests, tokens = state.requests.used(now_ms), state.tokens.used(now_ms)
        left = headers(remaining(limits.requests, requests), remaining(limits.tokens, tokens))
        for kind, limit, used, window in (
            (LimitKind.REQUESTS, limits.requests, requests, state.requests),
            (LimitKind.TOKENS, limits.tokens, tokens, state.tokens),
        ):
            if limit is not None and used >= limit:
                wait_ms = window.wait_ms(now_ms, used + 1 - limit)
                raise refusal(kind, current=used + 1, limit=limit, wait_ms=wait_ms, left=left)
        assert limits.concurrency is not None
        raise refusal(
            LimitKind.CONCURRENCY, current=state.running + 1, limit=limits.concurrency, wait_ms=0, left=left
        )

    def _add_key(self, key_id: str, now_ms: int) -> _State:
        self._sweep(now_ms)
        state = self._keys[key_id] = _State()
        return state

    def _sweep(self, now_ms: int) -> None:
        """Forget who was idle for a minute; once a minute at most, when someone new comes."""
        if now_ms - self._swept_ms < _SWEEP_MS:
            return
        self._swept_ms = now_ms
        self._keys = {key_id: state for key_id, state in self._keys.items() if not state.idle(now_ms)}
        self._addresses = {a: window for a, window in self._addresses.items() if window.used(now_ms)}

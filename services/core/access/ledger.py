"""Token balances: spent in memory call by call, written to the database in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from services.core.access.principal import Clock
from services.core.errors import ErrorCode, ServiceError

FLUSH_SECONDS = 1.0
PATIENCE_SECONDS = 5.0

Spend = Callable[[Mapping[str, int]], Awaitable[Mapping[str, int]]]


@dataclass(slots=True)
class _Account:
    """Tokens of one key: ``spent`` as the database has it, ``pending`` not yet written."""

    granted: int
    spent: int
    pending: int = 0

    @property
    def left(self) -> int:
        return self.granted - self.spent - self.pending


class Ledger:
    """Balances of the metered keys this process has seen.

    A call costs one dictionary look-up. ``flush``, called every ``FLUSH_SECONDS`` and at the end, writes
    what was spent as one transaction and learns what other processes spent. So a killed process
    loses at most one second of spending, and several processes may together overspend a balance
    by what they spend in one. When the database stays away, metered keys get 503 once
    something has waited ``PATIENCE_SECONDS``: then at most six seconds can be lost.
    """

    def __init__(self, spend: Spend, clock: Clock) -> None:
        self._spend = spend
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._dirty: set[str] = set()
        self._dirty_since = 0.0
        self._writing = asyncio.Lock()
        self.version = 0
        """Grows at the start and the end of every flush, so it is odd during one."""

    @property
    def pending(self) -> int:
        """Tokens spent and not yet written."""
        return sum(self._accounts[key_id].pending for key_id in self._dirty)

    def learn(self, key_id: str, *, granted: int, spent: int, version: int) -> None:
        """Take over what the database says, as read when the ledger was at ``version``.

        A sum read across a flush may or may not hold what is counted as pending here: it is dropped.
        """
        account = self._accounts.get(key_id)
        if account is None:
            self._accounts[key_id] = _Account(granted, spent)
            return
        account.granted = granted
        if version == self.version and version % 2 == 0:
            account.spent = spent

    def check(self, key_id: str) -> None:
        """Refuse a key with nothing left: 403."""
        if self._accounts[key_id].left <= 0:
            raise ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)

    def debit(self, key_id: str, tokens: int) -> None:
        """Spend tokens; 403, spending none, when fewer are left. Raises 503 when nothing can be written."""
        account = self._accounts[key_id]
        if tokens > account.left:
            raise ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)
        now = self._clock.monotonic()
        if self._dirty and now - self._dirty_since > PATIENCE_SECONDS:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=FLUSH_SECONDS)
        self._book(key_id, account, tokens, now)

    def credit(self, key_id: str, tokens: int) -> None:
        """Give tokens back that a call did not use after all."""
        self._book(key_id, self._accounts[key_id], -tokens, self._clock.monotonic())

    async def flush(self) -> None:
        """Write what is pending; raises as the database does and then keeps it pending.

        One at a time: what two wrote at once would be spent twice until the next.
        """
        async with self._writing:
            await self._flush()

    async def _flush(self) -> None:
        pending = {key_id: self._accounts[key_id].pending for key_id in self._dirty}
        pending = {key_id: tokens for key_id, tokens in pending.items() if tokens}
        started = self._clock.monotonic()
        self.version += 1
        try:
            sums = await self._spend(pending) if pending else {}
        finally:
            self.version += 1
        for key_id, spent in sums.items():
            account = self._accounts[key_id]
            account.spent = spent
            account.pending -= pending[key_id]
        self._dirty = {key_id for key_id in self._dirty if self._accounts[key_id].pending}
        self._dirty_since = started

    def _book(self, key_id: str, account: _Account, tokens: int, now: float) -> None:
        account.pending += tokens
        if not self._dirty:
            self._dirty_since = now
        self._dirty.add(key_id)

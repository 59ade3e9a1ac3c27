"""A bound on the bytes that all calls hold together; calls wait for room in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Reservation:
    """Bytes that a call holds."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size

    def shrink(self, size: int) -> None:
        """Hold no more than ``size`` from now on."""
        if size < self.size:
            freed, self.size = self.size - size, size
            self._budget.release(freed)


class ByteBudget:
    """``limit`` bytes. A call that wants more than all has all of it, and so runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncGenerator[Reservation]:
        """Wait until ``size`` bytes are free and hold them inside the context."""
        size = min(size, self._limit)
        await self._acquire(size)
        reservation = Reservation(self, size)
        try:
            yield reservation
        finally:
            self.release(reservation.size)

    async def _acquire(self, size: int) -> None:
        if not self._waiting and self.held + size <= self._limit:
            self.held += size
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            else:
                self._waiting.remove(entry)
                self._admit()
            raise

    def release(self, size: int) -> None:
        """Give ``size`` bytes back."""
        self.held -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.held + self._waiting[0][0] <= self._limit:
            size, turn = self._waiting.popleft()
            self.held += size
            if turn.cancelled():
                self.held -= size
            else:
                turn.set_result(None)

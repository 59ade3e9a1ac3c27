"""A bound on the bytes that all calls hold together; calls wait for room in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Reservation:
    """Bytes that a call holds until it releases them."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size

    def resize(self, size: int) -> None:
        """Hold ``size`` from now on, which is not waited for: what is there already has to be counted."""
        change, self.size = size - self.size, size
        self._budget.change(change)

    def release(self) -> None:
        """Hold nothing any more."""
        self.resize(0)


class ByteBudget:
    """``limit`` bytes. A call that wants more than all has all of it, and so runs alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncGenerator[Reservation]:
        """Wait until ``size`` bytes are free and hold them inside the context."""
        reservation = await self.reserve(size)
        try:
            yield reservation
        finally:
            reservation.release()

    async def reserve(self, size: int) -> Reservation:
        """Wait until ``size`` bytes are free; they are held until the reservation is released."""
        size = min(size, self.limit)
        if not self._waiting and self.held + size <= self.limit:
            self.held += size
            return Reservation(self, size)
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.change(-size)
            else:
                self._waiting.remove(entry)
                self._admit()
            raise
        return Reservation(self, size)

    def change(self, size: int) -> None:
        """Count ``size`` bytes more, or less where it is below 0."""
        self.held += size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.held + self._waiting[0][0] <= self.limit:
            size, turn = self._waiting.popleft()
            self.held += size
            if turn.cancelled():
                self.held -= size
            else:
                turn.set_result(None)

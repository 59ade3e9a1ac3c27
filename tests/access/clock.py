"""A clock that tests turn, and a wait for what happens in its own time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.core.access.principal import Clock


class HandClock:
    """Stands still until ``forward``; starts at a full second, as slots do."""

    def __init__(self) -> None:
        self.seconds = 1_900_000_000.0

    def forward(self, seconds: float) -> None:
        self.seconds += seconds

    def now(self) -> float:
        return self.seconds

    def now_ms(self) -> int:
        return round(self.seconds * 1000)

    @property
    def both(self) -> Clock:
        return Clock(monotonic=self.now, wall=self.now)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.01)

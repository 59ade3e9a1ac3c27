"""Ending calls that are over their time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

_SWEEP_SECONDS = 0.02


class Deadlines:
    """Cancels tasks at their time, a fiftieth of a second late at most.

    One timer looks at all calls in flight, since a timer for each would cost more than anything else the
    pipeline does for a call, and almost none of them ever goes off.
    """

    def __init__(self) -> None:
        self._due: dict[asyncio.Task[Any], float] = {}
        self._fired: set[asyncio.Task[Any]] = set()
        self._sweeping = False

    def watch(self, task: asyncio.Task[Any], when: float) -> None:
        """Cancel ``task`` at ``when``, on the ``time.monotonic`` clock, unless it is released before."""
        self._due[task] = when
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def release(self, task: asyncio.Task[Any]) -> bool:
        """Watch no longer; says whether the task was cancelled for its time, and takes that back."""
        self._due.pop(task, None)
        if task not in self._fired:
            return False
        self._fired.remove(task)
        task.uncancel()
        return True

    def _sweep(self) -> None:
        now = time.monotonic()
        for task in [task for task, when in self._due.items() if when <= now]:
            del self._due[task]
            self._fired.add(task)
            task.cancel()
        if self._due:
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
        else:
            self._sweeping = False

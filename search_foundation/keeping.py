"""Child processes that are kept running: whoever ends is started again."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

_FIRST_SECONDS = 0.5
_MOST_SECONDS = 30.0
_WELL_SECONDS = 60.0
"""A child that has run for so long was no failed start."""


class Child(Protocol):
    """A running process."""

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        ...

    async def stop(self, seconds: float) -> None:
        """End it in order, by force after ``seconds``; nothing if it has ended."""
        ...


C = TypeVar("C", bound=Child)


class ChildEndedError(Exception):
    """A child has ended before it ever worked; the text is a sentence for the operator."""


class Kept(Generic[C]):
    """A child that is started again when it ends, once it is known to work.

    One that ends soon after its start is waited for, longer each time: from half a second to half a minute.
    """

    def __init__(self, name: str, child: C, start: Callable[[], Awaitable[C]]) -> None:
        self.child = child
        self.works = False
        """Set when the child has done what it is for: from then on its end is an accident."""
        self._name = name
        self._start = start

    async def keep(self) -> None:
        """Start it again whenever it ends, for ever. Raises ChildEndedError, or what starting raises."""
        delay = _FIRST_SECONDS
        while True:
            started = time.monotonic()
            status = await self.child.wait()
            if not self.works:
                raise ChildEndedError(
                    f"{self._name} ended with status {status}; what was written above says why."
                )
            if time.monotonic() - started > _WELL_SECONDS:
                delay = _FIRST_SECONDS
            print(
                f"search-foundation: {self._name} ended with status {status}, starting again in {delay:g} s",
                file=sys.stderr,
                flush=True,
            )
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MOST_SECONDS)
            self.child = await self._start()

    async def stop(self, seconds: float) -> None:
        """End the child that runs now."""
        await self.child.stop(seconds)


async def keep_all(*children: Kept[Any]) -> None:
    """Keep all of them running; raises what keeping the first of them that fails raises."""
    tasks = [asyncio.create_task(child.keep()) for child in children]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    done.pop().result()


async def let_end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended, whatever it ends with."""
    task.cancel()
    await asyncio.wait((task,))

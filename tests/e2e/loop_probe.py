"""``search-foundation`` with a clock on its event loop: the CPU of each step, while nobody else has a turn.

Seconds of the loop's own thread, which other processes do not add to. ``SF_PROBE_FILE`` names the file that
gets a line for each step of more than a millisecond, and before them one for a piece of work to compare with.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine
from typing import Any

import orjson
import uvloop

from search_foundation.cli import main

_LEAST = 0.001


def unit() -> float:
    """Seconds of CPU that it takes to read and let go of 200,000 empty lists, the best of some."""
    data = b"[" + b"[]," * 200_000 + b"[]]"
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        orjson.loads(data)
        best = min(best, time.thread_time() - began)
    return best


def watch(path: str) -> None:
    run: Any = asyncio.events.Handle._run  # type: ignore[attr-defined]
    file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the process is
    print(unit(), file=file)

    def timed(handle: Any) -> None:
        began = time.thread_time()
        run(handle)
        took = time.thread_time() - began
        if took > _LEAST:
            print(took, file=file)

    asyncio.events.Handle._run = timed  # type: ignore[attr-defined]


def on_asyncio(work: Coroutine[Any, Any, int]) -> int:
    """Run on a loop whose steps are Python's."""
    return asyncio.run(work)


if __name__ == "__main__":
    watch(os.environ.pop("SF_PROBE_FILE"))
    uvloop.run = on_asyncio  # type: ignore[assignment]
    sys.exit(main())

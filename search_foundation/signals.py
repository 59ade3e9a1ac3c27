"""Being told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any


def stop_signal() -> asyncio.Task[Any]:
    """Make SIGTERM and SIGINT end a task; a second one ends the process at once, and its children with it."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return loop.create_task(asked.wait())

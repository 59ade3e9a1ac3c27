"""How many of the machine's CPUs this process may run on."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """CPUs of this process: on Linux those of its affinity, elsewhere the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

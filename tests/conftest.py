"""For every test."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core. More threads than that would wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# ``tests.stack`` starts processes by fork, so that they end with this one. gRPC would restart its threads in
# the child before it execs, and sometimes aborts there. It reads this when it is first imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in the background of a shell. Processes inherit that, and some tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LONG = ("clients", "docker", "e2e", "serving", "helm", "modeling", "batch", "library", "gateway")
"""Folders of files that take a minute; a file that ends last is to be one of seconds."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the million objects that seven thousand tests are out of every garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put folders of long files first: told not to reorder, xdist gives files out in this order."""
    here = Path(__file__).parent
    first = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: first.get(item.path.relative_to(here).parts[0], len(first)))

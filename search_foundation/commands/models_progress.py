"""Progress of a pull: a bar on a terminal, else a line per finished file and per tenth of the bytes."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from services.core.catalog.hub import RemoteFile, Snapshot
from services.core.catalog.pull import Progress


@contextmanager
def pull_progress(snapshot: Snapshot) -> Generator[Progress]:
    """Give the callback that ``pull`` reports to; it writes to stderr."""
    if sys.stderr.isatty():
        with _bar(snapshot) as progress:
            yield progress
    else:
        yield _lines(snapshot)


@contextmanager
def _bar(snapshot: Snapshot) -> Generator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    there: dict[str, int] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(snapshot.repository, total=snapshot.size)

        def progress(file: RemoteFile, size: int) -> None:
            there[file.name] = size
            bar.update(task, completed=sum(there.values()), description=file.name)

        yield progress


def _lines(snapshot: Snapshot) -> Progress:
    there: dict[str, int] = {}
    tenths = 0

    def progress(file: RemoteFile, size: int) -> None:
        nonlocal tenths
        there[file.name] = size
        done = sum(there.values())
        reached = done * 10 // max(snapshot.size, 1)
        if size == file.size:
            print(f"  {file.name}: {size:,} bytes", file=sys.stderr, flush=True)
        elif reached > tenths:
            print(f"  {file.name}: {done:,} of {snapshot.size:,} bytes", file=sys.stderr, flush=True)
        tenths = max(tenths, reached)

    return progress

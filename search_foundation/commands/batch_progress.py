"""Progress of a job and of a download: a bar on a terminal, else a line now and then; all on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from search_foundation.batch_client import Status
from search_foundation.batch_download import Progress

Show = Callable[[Status], None]


@contextmanager
def job_progress() -> Generator[Show]:
    """Give the callback that is told each status of a job."""
    if sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


def counts(status: Status) -> tuple[int, int, int]:
    """Lines done (failed ones too), failed and in all."""
    stats = status.get("stats") or {}
    failed = int(stats.get("failed") or 0)
    return int(stats.get("completed") or 0) + failed, failed, int(stats.get("total") or 0)


@contextmanager
def _bar() -> Generator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    from search_foundation.commands.time_left import TimeLeft

    class Rate(ProgressColumn):
        """Lines per second, lately."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} lines/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeLeft(),
    )
    task: TaskID | None = None
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(status: Status) -> None:
            nonlocal task
            done, failed, total = counts(status)
            words = f"{status['status']}, {failed} failed" if failed else str(status["status"])
            if task is None:
                # What was done before does not count for the rate.
                task = bar.add_task(words, total=total or None, completed=done)
            bar.update(task, description=words, total=total or None, completed=done)

        yield show


def _lines() -> Show:
    told: tuple[str, int] | None = None
    began: tuple[float, int] | None = None

    def show(status: Status) -> None:
        nonlocal told, began
        done, failed, total = counts(status)
        now = time.monotonic()
        began = began or (now, done)
        news = (str(status["status"]), done * 10 // max(total, 1))
        if news == told:
            return
        told = news
        words = [f"{status['batch_id']}: {status['status']}"]
        if total:
            words.append(f"{done:,} of {total:,} lines" + (f", {failed:,} failed" if failed else ""))
        seconds, lines = now - began[0], done - began[1]
        if lines and seconds:
            words.append(f"{lines / seconds:,.0f} lines/s")
            if done < total:
                words.append(f"{(total - done) * seconds / lines:,.0f} s left")
        print(", ".join(words), file=sys.stderr, flush=True)

    return show


@contextmanager
def bytes_progress(name: str) -> Generator[Progress]:
    """Give the callback that is told the bytes of a download."""
    if not sys.stderr.isatty():
        yield lambda _size, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    from search_foundation.commands.time_left import TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeLeft(),
    )
    task: TaskID | None = None
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(size: int, total: int | None) -> None:
            nonlocal task
            if task is None:
                # What an earlier run has brought does not count for the rate.
                task = bar.add_task(name, total=total, completed=size)
            bar.update(task, total=total, completed=size)

        yield show

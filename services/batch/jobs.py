"""What this room needs of an engine for durable tasks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class TaskKind(StrEnum):
    """What is to be done for a job."""

    PREPARE = "prepare"
    FETCH = "fetch"
    """To prepare a job whose input lies elsewhere, which is mostly waiting for somebody's server."""
    CHUNK = "chunk"
    NOTIFY = "tell"


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work; ``number`` is that of a chunk, or of an attempt to tell of the end.

    Tasks of a model go to processes that serve it.
    """

    kind: TaskKind
    job_id: str
    model: str
    owner: str
    number: int = 0

    @property
    def id(self) -> str:
        """The same for the same work: submitting it twice does it once."""
        return f"{self.job_id}:{self.kind}:{self.number}"


Handler = Callable[[Task], Coroutine[Any, Any, None]]
"""Does a task. It may run again after a crash and, rarely, twice at a time: doing it must be idempotent."""


class JobEngine(Protocol):
    """Tasks that are done however often processes die: by the process that took them, or by another.

    Tasks of one kind and model start fairly among owners, not in order.
    """

    async def start(self, handler: Handler) -> None:
        """Begin to take tasks, first those that this worker had when it died."""
        ...

    async def submit(self, task: Task, delay: float = 0.0) -> None:
        """Store a task; when this returns it will be done, after ``delay`` seconds at the earliest.

        Raises ``ServiceError`` SERVICE_UNAVAILABLE while tasks cannot be stored.
        """
        ...

    async def cancel(self, job_id: str) -> None:
        """Drop the tasks of a job that have not begun."""
        ...

    async def forget(self, job_id: str) -> None:
        """Delete what is stored of a job's tasks."""
        ...

    async def stop(self, grace: float) -> None:
        """Take no more tasks, let those at work end for up to ``grace`` seconds, leave the rest to others."""
        ...

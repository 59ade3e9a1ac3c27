"""Jobs and their status, free of any wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a job is; the values are those of the REST field ``status``."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether it stays so, but for expiring."""
        return self not in RUNNING


RUNNING = frozenset({State.PENDING, State.PROCESSING})


class File(StrEnum):
    """The files of a job; the values are the last words of their REST paths."""

    OUTPUT = "output"
    ERRORS = "errors"


class JobForm(StrEnum):
    """Whose shape a job has: what its lines may say, and by which paths it is told of beside our own."""

    OWN = "own"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is told of a job. Times are seconds since the epoch; ``total`` is 0 until lines are counted."""

    batch_id: str
    state: State
    model: str
    created_at: float
    completed_at: float | None
    expires_at: float
    total: int = 0
    completed: int = 0
    failed: int = 0
    total_tokens: int = 0
    error: str | None = None
    output_url: str | None = None
    error_file_url: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A checked request for a job: ``lines`` (JSON objects as they came), ``input_url`` or ``input_file``.

    ``input_file`` is the id of an uploaded file; ``metadata`` JSON that its owner wants to see again.
    """

    model: str
    lines: Sequence[Any] | None
    input_url: str | None
    task: str | None = None
    dimensions: int | None = None
    normalized: bool = True
    webhook_url: str | None = None
    form: JobForm = JobForm.OWN
    input_file: str | None = None
    metadata: str = ""


def status_json(status: JobStatus) -> dict[str, Any]:
    """Lay out the REST object ``JobStatus``, which webhooks carry too."""
    return {
        "batch_id": status.batch_id,
        "status": status.state.value,
        "model": status.model,
        "created_at": timestamp(status.created_at),
        "completed_at": None if status.completed_at is None else timestamp(status.completed_at),
        "expires_at": timestamp(status.expires_at),
        "output_url": status.output_url,
        "error_file_url": status.error_file_url,
        "error": status.error,
        "stats": {
            "total": status.total,
            "completed": status.completed,
            "failed": status.failed,
            "total_tokens": status.total_tokens,
        },
    }


def timestamp(seconds: float) -> str:
    """Write a time as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

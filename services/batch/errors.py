"""The failures of this capability, in the words of the table of errors."""

from __future__ import annotations

from services.batch.types import File, State
from services.core.errors import ErrorCode, ServiceError

_LONGEST_ID = 100


def not_found(batch_id: str) -> ServiceError:
    """Say that there is no such job, or none of this caller's: which of both is not told."""
    return ServiceError(
        ErrorCode.RESOURCE_NOT_FOUND, resource_type="Batch", resource_id=batch_id[:_LONGEST_ID]
    )


def file_not_found(batch_id: str, file: File) -> ServiceError:
    """Say that a job has no such file, or has it no more."""
    kind = "Batch output" if file is File.OUTPUT else "Batch error file"
    return ServiceError(ErrorCode.RESOURCE_NOT_FOUND, resource_type=kind, resource_id=batch_id)


def not_ended(batch_id: str, retry_after: float) -> ServiceError:
    """Say that a file is asked for before the job has ended."""
    return ServiceError(
        ErrorCode.CONFLICT_RESOURCE_BUSY,
        resource_type="Batch",
        resource_id=batch_id,
        retry_after=retry_after,
    )


def ended(batch_id: str, state: State) -> ServiceError:
    """Say that a job cannot be cancelled any more."""
    return ServiceError(
        ErrorCode.CONFLICT_STATE, reason=f"Batch '{batch_id}' is {state.value} and cannot be cancelled."
    )

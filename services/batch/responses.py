"""The answers about jobs, for the OpenAPI document only; ``types.status_json`` writes them by hand."""

from __future__ import annotations

from pydantic import BaseModel, Field

from services.batch.types import State


class BatchStats(BaseModel):
    """How far a job is."""

    total: int = Field(description="Lines of the input; 0 until they have been counted.", ge=0)
    completed: int = Field(description="Lines in the output so far.", ge=0)
    failed: int = Field(description="Lines in the error file so far.", ge=0)
    total_tokens: int = Field(description="Tokens billed so far.", ge=0)


class QuotaFigure(BaseModel):
    """One quota of a key."""

    used: int = Field(description="What the key has now.", ge=0)
    limit: int | None = Field(description="What its tier allows; null without a limit.")


class Quota(BaseModel):
    """What a key has stored and unfinished, and may have."""

    tier: str = Field(description="The key's tier.")
    quotas: dict[str, QuotaFigure] = Field(
        description="`unfinished_jobs`, `unfinished_lines`, `unfinished_webhooks` and `stored_bytes`."
    )


class BatchStatus(BaseModel):
    """Status of a job."""

    batch_id: str = Field(description="Names the job.")
    status: State = Field(description="Where the job is.")
    model: str = Field(description="Id of the model, without a prefix.")
    created_at: str = Field(description="When the job was made, ISO 8601 in UTC.")
    completed_at: str | None = Field(description="When the job ended.")
    expires_at: str = Field(description="When its files are deleted.")
    output_url: str | None = Field(description="Where the output is, once the job has ended.")
    error_file_url: str | None = Field(description="Where the error file is; null when no line failed.")
    error: str | None = Field(description="Why the job failed.")
    stats: BatchStats

"""Requests for jobs and their status: what ``/v1/batch/embeddings`` takes and answers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from google.protobuf.message import Message
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.requests.fields import Flag, Whole, class_name, clean_url, without_default
from services.core.requests.parsing import Locate, ModelSchemas, rest_location


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


_ID = re.compile(r"batch_[0-9a-f]{32}")


def new_job_id() -> str:
    """Make an id of 122 random bits."""
    return f"batch_{uuid.uuid4().hex}"


def is_job_id(text: str) -> bool:
    """Whether a text can be the id of a job."""
    return _ID.fullmatch(text) is not None


def new_file_id() -> str:
    """Make the id of an uploaded file."""
    return f"file-{uuid.uuid4().hex}"


def job_file_id(job_id: str, file: File) -> str:
    """Give the id of a job's file beside the uploaded ones."""
    return f"file-{job_id.removeprefix('batch_')}-{file}"


def file_key(file_id: str) -> str:
    """Give the key of an uploaded file."""
    return f"files/{file_id}.jsonl"


def folder(job_id: str) -> str:
    """Give what the keys of all files of a job begin with."""
    return f"batches/{job_id}"


def input_key(job_id: str, name: str | None = None) -> str:
    """Give the key of a job's input; ``name`` is that of one attempt at fetching it from elsewhere."""
    return f"{folder(job_id)}/input.jsonl" if name is None else f"{folder(job_id)}/input-{name}.jsonl"


def part_key(job_id: str, name: str, file: File) -> str:
    """Give the key of a chunk's part of a file; ``name`` is that of one attempt at the chunk."""
    return f"{folder(job_id)}/parts/{name}.{file}.jsonl"


def joined_key(job_id: str, file: File) -> str:
    """Give the key of a whole file."""
    return f"{folder(job_id)}/{file}.jsonl"


MAX_INLINE_LINES = 10_000
SCHEMES = ("https", "http", "s3", "gs")

_LONGEST_URL = 8192
_DEFAULT_TASK = "text-matching"
_RETRIEVAL = "retrieval"
_PASSAGE = "retrieval.passage"

Url = Annotated[str, Field(max_length=_LONGEST_URL), AfterValidator(clean_url)]
Lines = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_INLINE_LINES)]


class BatchEmbeddingRequest(BaseModel):
    """What every model takes. ``model`` and its choices come with the subclass of a model."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input: Lines | None = Field(
        None,
        json_schema_extra=without_default,
        description='Up to 10,000 lines, each `{"custom_id": ..., "body": {"input": ...}}` with an input as '
        "`POST /v1/embeddings` takes it. Either `input` or `input_url`.",
    )
    input_url: Url | None = Field(
        None,
        json_schema_extra=without_default,
        description="https://, s3:// or gs:// URL of a JSONL file of up to 50,000 such lines.",
    )
    webhook_url: Url | None = Field(
        None,
        json_schema_extra=without_default,
        description="Is sent the status by POST when the job has ended.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.input_url is None):
            raise PydanticCustomError("input_source", "Provide either 'input' or 'input_url'")
        if self.input_url is not None and self.input_url.partition("://")[0] not in SCHEMES:
            raise PydanticCustomError("url_scheme", "'input_url' should begin with https://, s3:// or gs://")
        return self


def request_schema(spec: ModelSpec) -> type[BatchEmbeddingRequest]:
    """Make the request class of one model."""
    fields: dict[str, Any] = {
        "model": (SkipValidation[Literal[spec.id]], Field(description="Id of the model.")),
        **_optional_fields(spec),
    }
    return create_model(
        class_name(spec, "BatchEmbeddingRequest"),
        __base__=BatchEmbeddingRequest,
        __doc__=f"A job for {spec.id}: texts of up to {spec.context_length} tokens.",
        **fields,
    )


def task_of(spec: ModelSpec, asked: str | None) -> str | None:
    """Give the model's task for what was asked: ``retrieval`` is about passages, nothing is text matching."""
    if asked == _RETRIEVAL:
        return _PASSAGE
    if asked is None and _DEFAULT_TASK in spec.tasks:
        return _DEFAULT_TASK
    return asked


def _optional_fields(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if spec.normalize_choice:
        fields["normalized"] = (Flag, Field(True, description="Scale vectors to length 1."))
    if spec.matryoshka or spec.dimension_choices:
        fields["dimensions"] = (
            _dimensions(spec) | None,
            Field(
                None,
                json_schema_extra=without_default,
                description=f"Keep only the first components. The full width is {spec.dimensions}.",
            ),
        )
    if spec.tasks:
        default = task_of(spec, None) or spec.default_task
        shown: Any = {"default": default} if default else without_default
        tasks: Any = Literal[(*spec.tasks, *((_RETRIEVAL,) if _PASSAGE in spec.tasks else ()))]
        fields["task"] = (
            tasks | None,
            Field(None, json_schema_extra=shown, description="What the vectors are for."),
        )
    return fields


def _dimensions(spec: ModelSpec) -> Any:
    if spec.dimension_choices:
        return Annotated[Literal[spec.dimension_choices], Whole]
    return Annotated[int, Field(gt=0, le=spec.dimensions), Whole]


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


DEFAULT_LIMIT = 20
MAX_LIMIT = 1_000


class BatchParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec]) -> None:
        self._specs = {spec.id: spec for spec in served if spec.supports(Capability.BATCH)}
        schemas = {spec.id: request_schema(spec) for spec in self._specs.values()}
        self._schemas = ModelSchemas(catalog, schemas)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that jobs may name."""
        return tuple(self._specs)

    def model(self, name: str) -> str:
        """Give the id of the served model of a name; raises INPUT_MODEL_NOT_FOUND."""
        return self._schemas.model({"model": name})

    def parse(self, fields: dict[str, Any], locate: Locate = rest_location) -> BatchRequest:
        """Check the fields of a request; raises ``ServiceError`` as ``ModelSchemas.check`` does."""
        model, checked = self._schemas.check(fields, locate)
        values = vars(checked)
        return BatchRequest(
            model=model,
            lines=checked.input,
            input_url=checked.input_url,
            task=task_of(self._specs[model], values.get("task")),
            dimensions=values.get("dimensions"),
            normalized=values.get("normalized") is not False,
            webhook_url=checked.webhook_url,
        )


def of_query(query: Message, name: str) -> str | None:
    """Return a field of a query, None where it did not come; raises ``ServiceError`` VALIDATION_ERROR."""
    values: Sequence[str] = getattr(query, name)
    if len(values) > 1:
        raise validation_error(
            [FieldError(f"query -> {name}", "should come once", "value_error", list(values))]
        )
    return values[0] if values else None


def parse_limit(text: str | None, default: int = DEFAULT_LIMIT, most: int = MAX_LIMIT) -> int:
    """Read the length of a list; more than there may be is the most."""
    return default if text is None else min(whole_number(text, "limit", 1), most)


def parse_offset(text: str | None) -> int:
    """Read how many bytes to leave out."""
    return 0 if text is None else whole_number(text, "offset", 0)


def whole_number(text: str, name: str, least: int) -> int:
    """Read a number of a query; raises ``ServiceError`` VALIDATION_ERROR."""
    place = f"query -> {name}"
    if not (text.isascii() and text.lstrip("-").isdigit() and len(text) < 19):
        raise validation_error([FieldError(place, "Input should be a valid integer", "int_parsing", text)])
    value = int(text)
    if value < least:
        message = f"Input should be greater than or equal to {least}"
        raise validation_error([FieldError(place, message, "greater_than_equal", text)])
    return value


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

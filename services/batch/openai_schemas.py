"""OpenAI's files and batches: what bodies may hold, what is answered, and both in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from services.core.errors import ErrorCode
from services.core.openapi.parts import (
    JSON,
    LIMIT_HEADERS,
    Chapter,
    Document,
    answer,
    call,
    path_parameter,
    query_parameter,
)

ENDPOINT = "/v1/embeddings"
"""What a line calls."""

WINDOW = "24h"

_TAG = "OpenAI"
_TAG_WORDS = "Files and batches for OpenAI's clients. `/openai/v1/embeddings` and `/models` answer as well."
_NOT_FOUND = (ErrorCode.RESOURCE_NOT_FOUND,)
_STORED = (ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED, ErrorCode.STORAGE_FULL, ErrorCode.INPUT_TOO_LARGE)
_FILE_ID = path_parameter("file_id", "Id of a file of one's own.")
_BATCH_ID = path_parameter("batch_id", "Id of a batch of one's own.")

_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class BatchBody(BaseModel):
    """Body of ``POST /openai/v1/batches``."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input_file_id: str = Field(description="Id of an uploaded file of lines.")
    endpoint: Literal["/v1/embeddings"] = Field(description="What the lines call.")
    completion_window: Literal["24h"] = Field(description="In which the batch is done, or expires.")
    metadata: dict[_Key, _Value] | None = Field(None, max_length=16, description="Told again with the batch.")


class OpenAIFile(BaseModel):
    """A file, as OpenAI describes it. All times are seconds since the epoch."""

    id: str
    object: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str = Field(description="`batch`, or `batch_output` of those that batches made.")
    status: str
    status_details: None


class OpenAIFileList(BaseModel):
    """A page of files."""

    object: str
    data: list[OpenAIFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """What is answered when a file is gone."""

    id: str
    object: str
    deleted: bool


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class OpenAIBatch(BaseModel):
    """A batch, as OpenAI describes it; `model` is an addition."""

    id: str
    object: str
    endpoint: str
    model: str
    errors: dict[str, Any] | None
    input_file_id: str | None = Field(description="`null` of a job that was not made from a file.")
    completion_window: str
    status: str = Field(description="validating, in_progress, completed, failed, expired or cancelled.")
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class OpenAIBatchList(BaseModel):
    """A page of batches."""

    object: str
    data: list[OpenAIBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def openai_chapter() -> Chapter:
    """``/openai/v1/files`` and ``/openai/v1/batches``, over the same jobs as ``/v1/batch``."""
    answers = (OpenAIFile, OpenAIFileList, DeletedFile, OpenAIBatch, OpenAIBatchList)
    return Chapter({_TAG: _TAG_WORDS}, paths=_files() | _batches(), answers=answers)


def _files() -> Document:
    file = answer("The file.", OpenAIFile, LIMIT_HEADERS)
    files = answer("A page of files.", OpenAIFileList, LIMIT_HEADERS)
    gone = answer("It is gone.", DeletedFile, LIMIT_HEADERS)
    content: Document = {
        "description": "The file.",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        "headers": LIMIT_HEADERS,
    }
    form: Document = {
        "type": "object",
        "properties": {
            "purpose": {"type": "string", "enum": ["batch"]},
            "file": {"type": "string", "format": "binary"},
            "expires_after[seconds]": {"type": "integer", "minimum": 1},
        },
        "required": ["purpose", "file"],
    }
    upload = call(_TAG, "Upload a file of lines", "openai_upload_file", file, (), _STORED)
    upload["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    deleting = (*_NOT_FOUND, ErrorCode.CONFLICT_STATE)
    order: Document = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
    page = [
        *_page(10_000, 10_000),
        query_parameter("purpose", {"type": "string"}),
        query_parameter("order", order),
    ]
    return {
        "/openai/v1/files": {
            "post": upload,
            "get": call(_TAG, "List files", "openai_list_files", files, page, _NOT_FOUND),
        },
        "/openai/v1/files/{file_id}": {
            "get": call(_TAG, "Describe a file", "openai_get_file", file, [_FILE_ID], _NOT_FOUND),
            "delete": call(_TAG, "Delete a file", "openai_delete_file", gone, [_FILE_ID], deleting),
        },
        "/openai/v1/files/{file_id}/content": {
            "get": call(_TAG, "Download a file", "openai_download_file", content, [_FILE_ID], _NOT_FOUND)
        },
    }


def _batches() -> Document:
    batch = answer("The batch.", OpenAIBatch, LIMIT_HEADERS)
    batches = answer("A page of batches, the newest first.", OpenAIBatchList, LIMIT_HEADERS)
    making = (*_NOT_FOUND, *_STORED, ErrorCode.INPUT_MODEL_NOT_FOUND)
    create = call(_TAG, "Make a batch of a file", "openai_create_batch", batch, (), making)
    # Inlined: the document's schemas are those of models and answers.
    schema = BatchBody.model_json_schema()
    create["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    cancelling = (*_NOT_FOUND, ErrorCode.CONFLICT_STATE)
    listing = call(_TAG, "List batches", "openai_list_batches", batches, _page(100, 20), _NOT_FOUND)
    return {
        "/openai/v1/batches": {"post": create, "get": listing},
        "/openai/v1/batches/{batch_id}": {
            "get": call(_TAG, "Ask how far a batch is", "openai_get_batch", batch, [_BATCH_ID], _NOT_FOUND)
        },
        "/openai/v1/batches/{batch_id}/cancel": {
            "post": call(_TAG, "Cancel a batch", "openai_cancel_batch", batch, [_BATCH_ID], cancelling)
        },
    }


def _page(most: int, default: int) -> list[Document]:
    limit: Document = {"type": "integer", "minimum": 1, "default": default}
    return [
        query_parameter("limit", limit, f"How many at most, up to {most:,}."),
        query_parameter("after", {"type": "string"}, "Id of the last one of the page before."),
    ]

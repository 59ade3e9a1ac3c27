"""Batch jobs in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.batch.openai_schemas import openai_chapter
from services.batch.schema import BatchStatus, Quota, request_schema
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode
from services.core.openapi.parts import (
    LIMIT_HEADERS,
    Bounds,
    Chapter,
    Document,
    Operation,
    answer,
    call,
    header_parameter,
    list_answer,
    path_parameter,
    query_parameter,
)

_TAG = "Batch Embeddings"
_FILES = {"output": "output file", "errors": "error file"}
_NOT_FOUND = (ErrorCode.RESOURCE_NOT_FOUND,)
_BATCH_ID = path_parameter("batch_id", "Id of a job of one's own.")
_OFFSET = query_parameter(
    "offset",
    {"type": "integer", "minimum": 0, "default": 0},
    "Bytes to leave out, to go on with a download that broke off.",
)
_LIMIT = query_parameter(
    "limit", {"type": "integer", "minimum": 1, "default": 20}, "How many at most, up to 1,000."
)
_RANGE = header_parameter(
    "Range", "One range of bytes, as `bytes=1000-`. Other ranges are ignored, and all beside `offset`."
)
_IF_MATCH = header_parameter("If-Match", "Answer 412 unless the file has one of these tags.")
_IF_NONE_MATCH = header_parameter(
    "If-None-Match", "Answer 304, without a body, if the file has one of these tags."
)


def chapters(specs: Sequence[ModelSpec], bounds: Bounds) -> Iterator[Chapter]:
    """``/v1/batch/...`` and ``/v1/batches`` of these models, and OpenAI's files and batches."""
    operation = Operation(
        path="/v1/batch/embeddings",
        name="create_batch",
        tag=_TAG,
        summary="Embed many texts in the background",
        description="Stores a job. What is wrong with single lines is told in its error file.",
        title="Batch Embedding Request",
        requests={spec.id: request_schema(spec) for spec in specs},
        answer=BatchStatus,
        answered="The job is stored and will be done.",
        errors=(ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED, ErrorCode.STORAGE_FULL),
    )
    tags = {_TAG: "Embed many texts in the background."}
    yield Chapter(tags, (operation,), paths=_paths(), answers=(Quota,))
    yield openai_chapter()


def _paths() -> Document:
    status = answer("Where the job is.", BatchStatus, LIMIT_HEADERS)
    listed = list_answer("The newest jobs of the key, newest first.", BatchStatus, LIMIT_HEADERS)
    quota = answer("What the key has and may have.", Quota, LIMIT_HEADERS)
    cancelled = (*_NOT_FOUND, ErrorCode.CONFLICT_STATE)
    return {
        "/v1/batches": {"get": call(_TAG, "List one's jobs", "list_batches", listed, [_LIMIT])},
        "/v1/quota": {"get": call(_TAG, "Ask for one's quotas", "get_quota", quota)},
        "/v1/batch/{batch_id}": {
            "get": call(_TAG, "Ask how far a job is", "get_batch", status, [_BATCH_ID], _NOT_FOUND),
            "delete": call(_TAG, "Cancel a job", "cancel_batch", status, [_BATCH_ID], cancelled),
        },
        **{f"/v1/batch/{{batch_id}}/{file}": {"get": _download(file)} for file in _FILES},
    }


def _download(file: str) -> Document:
    words = _FILES[file]
    content: Document = {
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        "headers": LIMIT_HEADERS,
    }
    described = call(
        _TAG,
        f"Download the {words}",
        f"download_batch_{file}",
        {"description": f"The {words}, one JSON object a line, in the order of the input."} | content,
        [_BATCH_ID, _OFFSET, _RANGE, _IF_MATCH, _IF_NONE_MATCH],
        (
            *_NOT_FOUND,
            ErrorCode.CONFLICT_RESOURCE_BUSY,
            ErrorCode.PRECONDITION_FAILED,
            ErrorCode.RANGE_NOT_SATISFIABLE,
        ),
    )
    described["responses"]["304"] = {"description": "The file is the one that `If-None-Match` names."}
    described["responses"]["206"] = {"description": "The part that `Range` asks for."} | content
    return described

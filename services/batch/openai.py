"""Jobs in the shape of OpenAI's files and batches: an adapter over the same service, for their clients.

It lives here and not in a room of vendors since it is about jobs alone: all it needs is this capability's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio
import orjson
from google.api import httpbody_pb2
from searchfoundation.v1 import batch_rest_pb2, batch_rest_pb2_grpc

from services.batch.lines import MAX_LINE_BYTES
from services.batch.openai_schemas import ENDPOINT, WINDOW, BatchBody
from services.batch.rest import NDJSON, caller
from services.batch.schema import (
    BatchParser,
    BatchRequest,
    File,
    JobForm,
    State,
    job_file_id,
    of_query,
    parse_limit,
    whole_number,
)
from services.batch.service import BatchService
from services.batch.table import BatchJob, UploadedFile
from services.batch.uploads import PURPOSE, Uploads
from services.core.call import current_call
from services.core.errors import FieldError, ServiceError, validation_error
from services.core.media.lines import read_lines
from services.core.requests.parsing import checked
from services.core.serving.multipart import FormPart, form_parts
from services.core.serving.rest import Body, decode, encode

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_BATCHES, _DEFAULT_BATCHES = 100, 20
_MAX_FILES = 10_000
_LONGEST_NAME = 255
_LONGEST_TEXT = 256
"""Of a field of a form that is no file; all that are good are far shorter."""

_KEPT = "expires_after[seconds]"
_STATES: Mapping[State, str] = {
    State.PENDING: "validating",
    State.PROCESSING: "in_progress",
}
"""The others are called alike."""


class OpenAIBatchServicer(batch_rest_pb2_grpc.OpenAIBatchRestServiceServicer):
    """``OpenAIBatchRestService`` over the capability."""

    def __init__(self, parser: BatchParser, service: BatchService, uploads: Uploads) -> None:
        self._parser = parser
        self._service = service
        self._uploads = uploads

    # Files

    async def UploadFile(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /openai/v1/files``."""
        fields = await asyncio.to_thread(_fields, request)
        purpose = _text(fields, "purpose")
        if purpose != PURPOSE:
            raise _wrong("purpose", f"should be '{PURPOSE}', the only purpose that is served", purpose)
        file = fields.get("file")
        if file is None or file.filename is None:
            raise _wrong("file", "should be a file", None)
        kept = whole_number(_text(fields, _KEPT), _KEPT, 1) if _KEPT in fields else None
        saved = await self._uploads.save(
            caller(current_call.get()), file.filename[:_LONGEST_NAME], file.content, kept
        )
        return encode(_file(saved))

    async def ListFiles(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.ListFilesByQueryRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /openai/v1/files``."""
        key_id = current_call.get().key_id
        limit = parse_limit(of_query(request, "limit"), _MAX_FILES, _MAX_FILES)
        order, after = of_query(request, "order"), of_query(request, "after") or None
        if order not in (None, "asc", "desc"):
            raise _wrong("order", "should be 'asc' or 'desc'", order)
        if after is not None:
            await self._uploads.find(key_id, after)
        found = await self._uploads.list(
            key_id,
            purpose=of_query(request, "purpose") or "",
            after=after,
            limit=limit + 1,
            newest_first=order != "asc",
        )
        return encode(_page([_file(each) for each in found], limit))

    async def GetFile(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.FileByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /openai/v1/files/{file_id}``."""
        return encode(_file(await self._uploads.find(current_call.get().key_id, request.file_id)))

    async def DeleteFile(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.FileByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``DELETE /openai/v1/files/{file_id}``."""
        await self._uploads.delete(current_call.get().key_id, request.file_id)
        return encode({"id": request.file_id, "object": "file", "deleted": True})

    async def DownloadFile(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.FileByPathRequest, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Answer ``GET /openai/v1/files/{file_id}/content``."""
        file = await self._uploads.find(current_call.get().key_id, request.file_id)
        empty = True
        async with aclosing(self._uploads.pieces(file)) as pieces:
            async for piece in pieces:
                empty = False
                yield httpbody_pb2.HttpBody(content_type=NDJSON, data=piece)
        if empty:
            yield httpbody_pb2.HttpBody(content_type=NDJSON)

    # Batches

    async def CreateOpenAIBatch(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /openai/v1/batches``."""
        call = current_call.get()
        body = checked(BatchBody, await decode(request))
        file = await self._uploads.find(call.key_id, body.input_file_id)
        if file.purpose != PURPOSE:
            raise _wrong("input_file_id", f"should name a file of purpose '{PURPOSE}'", file.id)
        call.model = self._parser.model(await self._model(file))
        request_for_job = BatchRequest(
            call.model,
            None,
            None,
            form=JobForm.OPENAI,
            input_file=file.id,
            metadata=json.dumps(body.metadata) if body.metadata else "",
        )
        made = await self._service.create(request_for_job, caller(call), "")
        return encode(_batch(await self._service.job(made.batch_id, call.key_id)))

    async def ListOpenAIBatches(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.ListOpenAIBatchesByQueryRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /openai/v1/batches``."""
        key_id = current_call.get().key_id
        limit = parse_limit(of_query(request, "limit"), _DEFAULT_BATCHES, _MAX_BATCHES)
        after = of_query(request, "after") or None
        if after is not None:
            await self._service.job(after, key_id)
        found = await self._service.page(key_id, JobForm.OPENAI, after, limit + 1)
        return encode(_page([_batch(job) for job in found], limit))

    async def GetOpenAIBatch(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.BatchByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /openai/v1/batches/{batch_id}``."""
        return encode(_batch(await self._service.job(request.batch_id, current_call.get().key_id)))

    async def CancelOpenAIBatch(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.CancelOpenAIBatchByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /openai/v1/batches/{batch_id}/cancel``."""
        key_id = current_call.get().key_id
        await self._service.cancel(request.batch_id, key_id)
        return encode(_batch(await self._service.job(request.batch_id, key_id)))

    async def _model(self, file: UploadedFile) -> str:
        """Read the name of the model off the first line, which all others share."""
        async with (
            aclosing(self._uploads.pieces(file)) as pieces,
            aclosing(read_lines(pieces, MAX_LINE_BYTES)) as lines,
        ):
            async for line in lines:
                try:
                    value: Any = orjson.loads(line.data)
                    model = value["body"]["model"]
                except (orjson.JSONDecodeError, KeyError, TypeError):
                    model = None
                if isinstance(model, str):
                    return model
                message = f"has no model in line {line.number}, the first: 'body.model' should name it"
                raise _wrong("input_file_id", message, file.id)
        raise _wrong("input_file_id", "is a file without lines", file.id)


def _file(file: UploadedFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _batch(job: BatchJob) -> dict[str, Any]:
    ended = None if job.completed_at is None else int(job.completed_at)
    kept = job.state.ended and job.state is not State.EXPIRED
    reason = {"code": "failed", "message": job.error, "param": None, "line": None}
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": ENDPOINT,
        "model": job.model,
        "errors": None if job.error is None else {"object": "list", "data": [reason]},
        "input_file_id": job.input_file,
        "completion_window": WINDOW,
        "status": _STATES.get(job.state, job.state.value),
        "output_file_id": job_file_id(job.id, File.OUTPUT) if kept and job.completed else None,
        "error_file_id": job_file_id(job.id, File.ERRORS) if kept and job.failed else None,
        "created_at": int(job.created_at),
        "in_progress_at": int(job.created_at) if job.total else None,
        "expires_at": int(job.expires_at),
        "finalizing_at": ended if job.state is State.COMPLETED else None,
        "completed_at": ended if job.state is State.COMPLETED else None,
        "failed_at": ended if job.state is State.FAILED else None,
        "expired_at": int(job.expires_at) if job.state is State.EXPIRED else None,
        "cancelling_at": ended if job.state is State.CANCELLED else None,
        "cancelled_at": ended if job.state is State.CANCELLED else None,
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "metadata": json.loads(job.metadata) if job.metadata else None,
    }


def _page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Lay out a list of which one more was read than is told."""
    told = found[:limit]
    return {
        "object": "list",
        "data": told,
        "first_id": told[0]["id"] if told else None,
        "last_id": told[-1]["id"] if told else None,
        "has_more": len(found) > limit,
    }


def _fields(body: Body) -> dict[str, FormPart]:
    content, body.data = body.data, memoryview(b"")
    return {part.name: part for part in form_parts(content)}


def _text(fields: Mapping[str, FormPart], name: str) -> str:
    part = fields.get(name)
    if part is None:
        raise _wrong(name, "Field required", None)
    return bytes(part.content[:_LONGEST_TEXT]).decode("utf-8", "replace")


def _wrong(name: str, message: str, value: Any) -> ServiceError:
    return validation_error([FieldError(f"body -> {name}", message, "value_error", value)])

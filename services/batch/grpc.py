"""The typed gRPC door, and its messages from and to the plain types."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc

from services.batch.rest import base_url, caller
from services.batch.schema import DEFAULT_LIMIT, MAX_LIMIT, BatchParser, File, JobStatus, State
from services.batch.service import BatchService
from services.core.call import current_call
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path
from services.core.serving.vocabulary import task_name

_STATES = {
    State.PENDING: batch_pb2.BATCH_STATE_PENDING,
    State.PROCESSING: batch_pb2.BATCH_STATE_PROCESSING,
    State.COMPLETED: batch_pb2.BATCH_STATE_COMPLETED,
    State.FAILED: batch_pb2.BATCH_STATE_FAILED,
    State.EXPIRED: batch_pb2.BATCH_STATE_EXPIRED,
    State.CANCELLED: batch_pb2.BATCH_STATE_CANCELLED,
}


def request_fields(request: batch_pb2.CreateBatchRequest) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    fields: dict[str, Any] = {}
    if request.model:
        fields["model"] = request.model
    source = request.WhichOneof("source")
    if source == "input":
        fields["input"] = [_line(line) for line in request.input.lines]
    elif source == "input_url":
        fields["input_url"] = request.input_url
    if request.task:
        fields["task"] = task_name(request.task)
    for name in ("dimensions", "normalized"):
        if request.HasField(name):
            fields[name] = getattr(request, name)
    if request.webhook_url:
        fields["webhook_url"] = request.webhook_url
    return fields


def location(_model: str | None, place: Location) -> str:
    """Path of a field of ``CreateBatchRequest``, for example ``input.lines[3]``."""
    head, *rest = place or ("source",)
    return field_path("input.lines" if head == "input" else str(head), rest)


def batch_message(status: JobStatus) -> batch_pb2.Batch:
    """Render a status."""
    completed = status.completed_at
    return batch_pb2.Batch(
        id=status.batch_id,
        state=_STATES[status.state],
        model=status.model,
        created=_timestamp(status.created_at),
        completed=None if completed is None else _timestamp(completed),
        expires=_timestamp(status.expires_at),
        total=status.total,
        succeeded=status.completed,
        failed=status.failed,
        total_tokens=status.total_tokens,
        error=status.error or "",
        output_url=status.output_url or "",
        error_file_url=status.error_file_url or "",
    )


def file_asked(request: batch_pb2.DownloadBatchRequest) -> File:
    """Read which file is asked for."""
    return File.ERRORS if request.file == batch_pb2.BATCH_FILE_ERRORS else File.OUTPUT


def _line(line: batch_pb2.BatchLine) -> dict[str, Any]:
    return {
        "custom_id": line.custom_id,
        "body": {"input": [content_value(content) for content in line.inputs]},
    }


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


Context = grpc.aio.ServicerContext[Any, Any]


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """``BatchService`` over the capability."""

    def __init__(self, parser: BatchParser, service: BatchService, public_url: str | None) -> None:
        self._parser = parser
        self._service = service
        self._public_url = public_url

    async def CreateBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.CreateBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Store a job."""
        call = current_call.get()
        # In a thread: there may be ten thousand lines.
        parsed = await asyncio.to_thread(lambda: self._parser.parse(request_fields(request), location))
        call.model = parsed.model
        return batch_message(await self._service.create(parsed, caller(call), base_url(self._public_url)))

    async def GetBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.GetBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Tell how far a job is."""
        return batch_message(await self._service.status(request.id, current_call.get().key_id))

    async def WatchBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.WatchBatchRequest, context: Context
    ) -> AsyncIterator[batch_pb2.Batch]:
        """Tell of a job until it has ended."""
        async for status in self._service.watch(request.id, current_call.get().key_id):
            yield batch_message(status)

    async def ListBatches(  # noqa: N802 - named by the contract
        self, request: batch_pb2.ListBatchesRequest, context: Context
    ) -> batch_pb2.ListBatchesResponse:
        """List the newest jobs."""
        limit = min(request.limit or DEFAULT_LIMIT, MAX_LIMIT)
        found = await self._service.list(current_call.get().key_id, limit)
        return batch_pb2.ListBatchesResponse(batches=map(batch_message, found))

    async def CancelBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.CancelBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Cancel a job."""
        return batch_message(await self._service.cancel(request.id, current_call.get().key_id))

    async def DownloadBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.DownloadBatchRequest, context: Context
    ) -> AsyncIterator[batch_pb2.DownloadBatchResponse]:
        """Send a file."""
        found = await self._service.open(request.id, current_call.get().key_id, file_asked(request))
        async with aclosing(found.pieces(range(request.offset, found.length))) as pieces:
            async for piece in pieces:
                yield batch_pb2.DownloadBatchResponse(data=piece)

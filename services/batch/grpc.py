"""The typed gRPC door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc

from services.batch.messages import batch_message, file_asked, location, request_fields
from services.batch.parsing import DEFAULT_LIMIT, MAX_LIMIT, BatchParser
from services.batch.rest import base_url, caller
from services.batch.service import BatchService
from services.core.call import current_call

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
        return batch_message(await self._service.status(request.id, current_call.get().tenant))

    async def WatchBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.WatchBatchRequest, context: Context
    ) -> AsyncIterator[batch_pb2.Batch]:
        """Tell of a job until it has ended."""
        async for status in self._service.watch(request.id, current_call.get().tenant):
            yield batch_message(status)

    async def ListBatches(  # noqa: N802 - named by the contract
        self, request: batch_pb2.ListBatchesRequest, context: Context
    ) -> batch_pb2.ListBatchesResponse:
        """List the newest jobs."""
        limit = min(request.limit or DEFAULT_LIMIT, MAX_LIMIT)
        found = await self._service.list(current_call.get().tenant, limit)
        return batch_pb2.ListBatchesResponse(batches=map(batch_message, found))

    async def CancelBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.CancelBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Cancel a job."""
        return batch_message(await self._service.cancel(request.id, current_call.get().tenant))

    async def DownloadBatch(  # noqa: N802 - named by the contract
        self, request: batch_pb2.DownloadBatchRequest, context: Context
    ) -> AsyncIterator[batch_pb2.DownloadBatchResponse]:
        """Send a file."""
        found = await self._service.open(request.id, current_call.get().tenant, file_asked(request))
        async with aclosing(found.pieces(range(request.offset, found.length))) as pieces:
            async for piece in pieces:
                yield batch_pb2.DownloadBatchResponse(data=piece)

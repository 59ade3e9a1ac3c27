"""The typed gRPC door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
from searchfoundation.v1 import rerank_pb2, rerank_pb2_grpc

from services.core.call import Call, current_call
from services.core.errors import ErrorCode, ServiceError
from services.rerank.logic import Reranker
from services.rerank.messages import request_fields, response, unary_location
from services.rerank.parsing import RequestParser
from services.rerank.stream import RerankStreamLimits, read_stream

UnaryContext = grpc.aio.ServicerContext[rerank_pb2.RerankRequest, rerank_pb2.RerankResponse]
StreamContext = grpc.aio.ServicerContext[rerank_pb2.RerankStreamRequest, rerank_pb2.RerankResponse]


class RerankServicer(rerank_pb2_grpc.RerankServiceServicer):
    """``RerankService`` over the capability."""

    def __init__(self, parser: RequestParser, reranker: Reranker, limits: RerankStreamLimits) -> None:
        self._parser = parser
        self._reranker = reranker
        self._limits = limits

    async def Rerank(  # noqa: N802 - named by the contract
        self, request: rerank_pb2.RerankRequest, context: UnaryContext
    ) -> rerank_pb2.RerankResponse:
        """Rank all documents of one request."""
        call = current_call.get()
        parsed = self._parser.parse(request_fields(request, request.documents), unary_location)
        result = await self._reranker.rank(parsed, call)
        return await response(result, request.documents if parsed.return_documents else None, call.timings)

    async def RerankStream(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[rerank_pb2.RerankStreamRequest], context: StreamContext
    ) -> rerank_pb2.RerankResponse:
        """Rank the documents of a stream when all of them are there."""
        call = current_call.get()
        if call.deadline is not None:
            return await self._rank_stream(request_iterator, call)
        timeout = self._limits.timeout
        call.deadline = call.started + timeout
        clock = asyncio.timeout(timeout)
        try:
            async with clock:
                return await self._rank_stream(request_iterator, call)
        except TimeoutError:
            if not clock.expired():
                raise
            raise ServiceError(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=timeout) from None

    async def _rank_stream(
        self, messages: AsyncIterator[rerank_pb2.RerankStreamRequest], call: Call
    ) -> rerank_pb2.RerankResponse:
        streamed = await read_stream(messages, self._parser, self._limits)
        result = await self._reranker.rank(streamed.request, call)
        shown = streamed.documents if streamed.request.return_documents else None
        return await response(result, shown, call.timings)

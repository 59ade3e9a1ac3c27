"""The typed gRPC door."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
from searchfoundation.v1 import embed_pb2, embed_pb2_grpc

from services.core.call import current_call
from services.core.serving.messages import fill, timings
from services.embed.logic import Embedder
from services.embed.messages import embeddings, request_fields, unary_location, usage
from services.embed.parsing import RequestParser
from services.embed.stream import EmbedStream, EmbedStreamLimits

UnaryContext = grpc.aio.ServicerContext[embed_pb2.EmbedRequest, embed_pb2.EmbedResponse]
StreamContext = grpc.aio.ServicerContext[embed_pb2.EmbedStreamRequest, embed_pb2.EmbedStreamResponse]


class EmbedServicer(embed_pb2_grpc.EmbedServiceServicer):
    """``EmbedService`` over the capability."""

    def __init__(self, parser: RequestParser, embedder: Embedder, limits: EmbedStreamLimits) -> None:
        self._parser = parser
        self._embedder = embedder
        self._limits = limits

    async def Embed(  # noqa: N802 - named by the contract
        self, request: embed_pb2.EmbedRequest, context: UnaryContext
    ) -> embed_pb2.EmbedResponse:
        """Embed all inputs of one request."""
        call = current_call.get()
        fields = request_fields(request.model, request.inputs, request.options)
        parsed = self._parser.parse(fields, unary_location)
        result = await self._embedder.embed(parsed, call)
        response = embed_pb2.EmbedResponse(
            model=result.model, usage=usage(result), timings=timings(call.timings)
        )
        await fill(response.embeddings, embeddings(result))
        return response

    async def EmbedStream(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[embed_pb2.EmbedStreamRequest], context: StreamContext
    ) -> AsyncIterator[embed_pb2.EmbedStreamResponse]:
        """Embed the inputs of a stream, one answer for each, in order."""
        stream = EmbedStream(self._parser, self._embedder, current_call.get(), self._limits)
        async for response in stream.run(request_iterator):
            yield response

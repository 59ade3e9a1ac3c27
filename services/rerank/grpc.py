"""The typed gRPC door: messages from and to the plain types, single calls, and streams within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
from searchfoundation.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc

from services.core.call import Call, Timings, current_call
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path, fill, float_vectors, timings, usage
from services.rerank.logic import Reranker
from services.rerank.parsing import RequestParser
from services.rerank.types import RerankRequest, RerankResult

_OPTIONS = {"truncation": "truncate", "max_doc_length": "max_document_length"}
"""Names of options where they differ from those of the REST side."""


def request_fields(
    start: rerank_pb2.RerankRequest | rerank_pb2.RerankStart, documents: Iterable[common_pb2.Content]
) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    options = start.options
    fields: dict[str, Any] = {
        "documents": [content_value(document) for document in documents],
        "return_embeddings": options.return_embeddings,
    }
    if start.model:
        fields["model"] = start.model
    if start.HasField("query"):
        fields["query"] = content_value(start.query)
    if options.HasField("top_n"):
        fields["top_n"] = options.top_n
    if options.HasField("return_documents"):
        fields["return_documents"] = options.return_documents
    if options.HasField("truncate"):
        fields["truncation"] = options.truncate
    if options.HasField("max_document_length"):
        fields["max_doc_length"] = options.max_document_length
    return fields


def unary_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``RerankRequest``, for example ``documents[3].text`` or ``options.top_n``."""
    head, *rest = location
    name = str(head)
    if name in ("model", "query", "documents"):
        return field_path(name, rest)
    return field_path(f"options.{_OPTIONS.get(name, name)}", rest)


def stream_location(model: str | None, location: Location) -> str:
    """Path of a field of a stream: in its start, or of a document counted over all messages."""
    path = unary_location(model, location)
    return path if location[0] == "documents" else f"start.{path}"


async def response(
    result: RerankResult, documents: Sequence[common_pb2.Content] | None, measured: Timings
) -> rerank_pb2.RerankResponse:
    """Render a ranking; ``documents`` are those of the request, None to leave them out."""
    answer = rerank_pb2.RerankResponse(
        model=result.model,
        usage=usage(result.usage),
        timings=timings(measured),
    )
    await fill(answer.results, _ranked(result, documents))
    return answer


def _ranked(
    result: RerankResult, documents: Sequence[common_pb2.Content] | None
) -> Iterator[rerank_pb2.RankedDocument]:
    vectors = None if result.embeddings is None else float_vectors(result.embeddings)
    for rank, (index, score) in enumerate(zip(result.indices, result.scores, strict=True)):
        yield rerank_pb2.RankedDocument(
            index=index,
            relevance_score=score,
            document=None if documents is None else documents[index],
            embedding=None if vectors is None else vectors[rank],
        )


@dataclass(frozen=True, slots=True)
class RerankStreamLimits:
    """What one stream may hold in all: documents, and bytes of messages.

    ``timeout`` is in seconds for the whole stream, where the caller set no deadline.
    """

    documents: int
    size: int
    timeout: float


@dataclass(frozen=True, slots=True)
class StreamedRequest:
    """A request that has come whole, and its documents as they were sent."""

    request: RerankRequest
    documents: list[common_pb2.Content]


async def read_stream(
    messages: AsyncIterator[rerank_pb2.RerankStreamRequest], parser: RequestParser, limits: RerankStreamLimits
) -> StreamedRequest:
    """Read a stream to its end, or to where it passes a limit.

    Raises ``ServiceError`` as soon as it is known that the request cannot be answered: a wrong start before
    any document is read, ``INPUT_TOO_LARGE``, ``VALIDATION_ERROR``.
    """
    start = await _start(messages)
    parser.parse(request_fields(start, [common_pb2.Content(text="")]), stream_location)
    documents: list[common_pb2.Content] = []
    size = start.ByteSize()
    async for message in messages:
        if message.HasField("start"):
            raise _refusal("Only the first message may hold it", "extra_forbidden")
        documents.extend(message.documents.documents)
        size += message.ByteSize()
        if size > limits.size:
            raise ServiceError(ErrorCode.INPUT_TOO_LARGE, limit=limits.size)
        if len(documents) > limits.documents:
            break
    return StreamedRequest(parser.parse(request_fields(start, documents), stream_location), documents)


async def _start(messages: AsyncIterator[rerank_pb2.RerankStreamRequest]) -> rerank_pb2.RerankStart:
    first = await anext(messages, None)
    if first is None or not first.HasField("start"):
        raise _refusal("Required in the first message", "missing")
    return first.start


def _refusal(message: str, kind: str) -> ServiceError:
    return validation_error([FieldError("start", message, kind)])


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

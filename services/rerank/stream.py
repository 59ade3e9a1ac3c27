"""Reading a stream of documents within the limits of a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from searchfoundation.v1 import common_pb2, rerank_pb2

from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.rerank.messages import request_fields, stream_location
from services.rerank.parsing import RequestParser
from services.rerank.types import RerankRequest


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

"""The typed gRPC door: messages from and to the plain types, single calls, and streams in bounded memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc

from services.core.call import Call, Timings, current_call
from services.core.catalog.types import InputType
from services.core.errors import ErrorCode, ServiceError
from services.core.requests.content import Location
from services.core.serving.failure import failed_here, rpc_status
from services.core.serving.messages import content_value, field_path, fill, float_vectors, timings, usage
from services.core.serving.vocabulary import task_name
from services.embed.encoding import FloatMatrix, byte_rows
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.schema import INPUT_NAMES
from services.embed.types import EmbedResult, Encoding, MultiVectorResult, Result, SparseResult

ENCODINGS = {
    common_pb2.VECTOR_ENCODING_UNSPECIFIED: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT32_BYTES: Encoding.BASE64,
    common_pb2.VECTOR_ENCODING_BINARY: Encoding.BINARY,
    common_pb2.VECTOR_ENCODING_UBINARY: Encoding.UBINARY,
    common_pb2.VECTOR_ENCODING_INT8: Encoding.INT8,
    common_pb2.VECTOR_ENCODING_UINT8: Encoding.UINT8,
}
_ROLES = {
    int(common_pb2.INPUT_ROLE_QUERY): InputType.QUERY,
    int(common_pb2.INPUT_ROLE_DOCUMENT): InputType.DOCUMENT,
}
_OPTIONS = {"embedding_type": "options.encodings", "input_type": "options.role"}
"""Fields of the REST schema that have another name here."""

_ENCODING_NUMBERS = {encoding: number for number, encoding in ENCODINGS.items() if number}


def request_fields(
    model: str, inputs: Iterable[common_pb2.Content], options: embed_pb2.EmbedOptions
) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    fields: dict[str, Any] = {
        "input": [content_value(content) for content in inputs],
        "truncate": options.truncate,
    }
    if model:
        fields["model"] = model
    if options.task:
        fields["task"] = task_name(options.task)
    if options.HasField("dimensions"):
        fields["dimensions"] = options.dimensions
    if options.HasField("normalized"):
        fields["normalized"] = options.normalized
    if options.role:
        fields["input_type"] = str(_ROLES.get(options.role, options.role))
    if options.late_chunking:
        fields["late_chunking"] = True
    if options.return_multivector:
        fields["return_multivector"] = True
    if options.return_tokenized_input:
        fields["return_tokenized_input"] = True
    if options.encodings:
        fields["embedding_type"] = [ENCODINGS.get(number, str(number)) for number in options.encodings]
    return fields


def unary_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedRequest``, for example ``inputs[3].text`` or ``options.dimensions``."""
    return _path(location, "inputs")


def stream_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedStreamRequest``, which has one input."""
    return _path((*location[:1], *location[2:]) if _is_input(location) else location, "input")


def embeddings(result: Result) -> Iterable[embed_pb2.Embedding]:
    """Render one message per input, with all encodings asked for, as they are asked for."""
    if isinstance(result, EmbedResult):
        return _dense(result)
    if isinstance(result, MultiVectorResult):
        return (_multi_vector(result, index) for index in range(len(result.vectors)))
    return (
        embed_pb2.Embedding(
            index=index,
            sparse=common_pb2.SparseVector(tokens=vector.tokens, weights=vector.weights.tolist()),
        )
        for index, vector in enumerate(result.vectors)
    )


def _multi_vector(result: MultiVectorResult, index: int) -> embed_pb2.Embedding:
    tokens = None if result.tokens is None else result.tokens[index]
    first, *others = (
        common_pb2.MultiVector(vectors=dense_vectors(result.vectors[index], encoding), tokens=tokens)
        for encoding in result.encodings
    )
    return embed_pb2.Embedding(index=index, multi=first, multi_alternatives=others)


def _dense(result: EmbedResult) -> Iterable[embed_pb2.Embedding]:
    first, *others = (dense_vectors(result.vectors, encoding) for encoding in result.encodings)
    return (
        embed_pb2.Embedding(index=index, dense=dense, alternatives=[column[index] for column in others])
        for index, dense in enumerate(first)
    )


def dense_vectors(vectors: FloatMatrix, encoding: Encoding) -> list[common_pb2.DenseVector]:
    """Render (n, width) as n messages."""
    if encoding is Encoding.FLOAT:
        return float_vectors(vectors)
    width = vectors.shape[1]
    rows = byte_rows(vectors, encoding)
    number = _ENCODING_NUMBERS[encoding]
    return [common_pb2.DenseVector(encoding=number, dimensions=width, data=row) for row in rows]


def used(result: Result) -> common_pb2.Usage:
    """Render what a call consumed; sparse vectors count their entries as output."""
    return usage(result.usage, result.entries if isinstance(result, SparseResult) else None)


def _is_input(location: Location) -> bool:
    return bool(location) and location[0] in INPUT_NAMES


def _path(location: Location, input_name: str) -> str:
    head, *rest = location or INPUT_NAMES[:1]
    names = {"model": "model", INPUT_NAMES[0]: input_name} | _OPTIONS
    return field_path(names.get(str(head), f"options.{head}"), rest)


logger = logging.getLogger(__name__)

_Answer = asyncio.Task[tuple[embed_pb2.EmbedStreamResponse, int]]
"""Of one message, with the tokens that it is billed."""


@dataclass(frozen=True, slots=True)
class EmbedStreamLimits:
    """What one stream may hold at a time: messages, and bytes of requests.

    ``timeout`` is in seconds for each message, where the caller set no deadline for the stream.
    """

    messages: int
    size: int
    timeout: float


class _Window:
    """Room for requests being worked on. One reader enters; a single message always fits."""

    def __init__(self, limits: EmbedStreamLimits) -> None:
        self._limits = limits
        self._messages = 0
        self._size = 0
        self._room = asyncio.Event()

    async def enter(self, size: int) -> None:
        while self._messages and (
            self._messages >= self._limits.messages or self._size + size > self._limits.size
        ):
            self._room.clear()
            await self._room.wait()
        self._messages += 1
        self._size += size

    def leave(self, size: int) -> None:
        self._messages -= 1
        self._size -= size
        self._room.set()


class EmbedStream:
    """One call of ``EmbedStream``.

    A request is read only when there is room in the window, and leaves it when the caller has taken its
    answer. So a caller who sends faster than the model works, or takes answers slower, is held up by flow
    control.
    """

    def __init__(
        self, parser: RequestParser, embedder: Embedder, call: Call, limits: EmbedStreamLimits
    ) -> None:
        self._parser = parser
        self._embedder = embedder
        self._call = call
        self._limits = limits
        self._window = _Window(limits)
        self._answers: asyncio.Queue[tuple[_Answer, int] | None] = asyncio.Queue()  # the window bounds it
        self._model = ""
        self._options = embed_pb2.EmbedOptions()

    async def run(
        self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]
    ) -> AsyncIterator[embed_pb2.EmbedStreamResponse]:
        """Answer ``requests``; one that fails is answered by its error. Errors of reading end the stream."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._answers.put_nowait(None))
        try:
            while (entry := await self._answers.get()) is not None:
                answer, size = entry
                try:
                    response, billed = await answer
                    yield response
                    self._call.answered += billed
                finally:
                    answer.cancel()
                    self._window.leave(size)
            await reader
        finally:
            await self._drop(reader)

    async def _drop(self, reader: asyncio.Task[None]) -> None:
        """Cancel what is left when the caller is gone."""
        left: list[asyncio.Task[object]] = [reader]  # pyright: ignore[reportAssignmentType]
        while not self._answers.empty():
            if (entry := self._answers.get_nowait()) is not None:
                left.append(entry[0])  # pyright: ignore[reportArgumentType]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]) -> None:
        index = 0
        async for request in requests:
            size = request.ByteSize()
            await self._window.enter(size)
            self._remember(request)
            answer = asyncio.create_task(self._answer(index, request, self._model, self._options))
            self._answers.put_nowait((answer, size))
            index += 1

    def _remember(self, request: embed_pb2.EmbedStreamRequest) -> None:
        """Take over model and options for this message and those after it."""
        if request.HasField("options"):
            self._options = request.options
        elif request.model:
            self._options = embed_pb2.EmbedOptions()
        if request.model:
            self._model = request.model

    async def _answer(
        self, index: int, request: embed_pb2.EmbedStreamRequest, model: str, options: embed_pb2.EmbedOptions
    ) -> tuple[embed_pb2.EmbedStreamResponse, int]:
        billed = 0

        async def charge(tokens: int) -> None:
            nonlocal billed
            await self._call.charge(tokens)
            billed += tokens

        call = self._message_call(charge)
        try:
            result = await self._embed(request, model, options, call)
        except Exception as error:  # of one message only; the others go on
            if failed_here(error, call):
                self._call.refund(billed)
                billed = 0
            if isinstance(error, ServiceError):
                return self._failure(index, request.id, error), billed
            logger.exception("message of a stream failed", extra={"fields": {"request_id": call.request_id}})
            return self._failure(index, request.id, ServiceError(ErrorCode.INTERNAL_ERROR)), billed
        self._book(call)
        return embed_pb2.EmbedStreamResponse(index=index, id=request.id, result=result), billed

    async def _embed(
        self, request: embed_pb2.EmbedStreamRequest, model: str, options: embed_pb2.EmbedOptions, call: Call
    ) -> embed_pb2.EmbedStreamResult:
        parsed = self._parser.parse(request_fields(model, (request.input,), options), stream_location)
        result = await self._embedder.embed(parsed, call)
        return embed_pb2.EmbedStreamResult(
            model=result.model,
            embeddings=embeddings(result),
            usage=used(result),
            timings=timings(call.timings),
        )

    def _failure(self, index: int, id: str, error: ServiceError) -> embed_pb2.EmbedStreamResponse:
        status = rpc_status(error, self._call.request_id)
        return embed_pb2.EmbedStreamResponse(index=index, id=id, error=status)

    def _message_call(self, charge: Callable[[int], Awaitable[None]]) -> Call:
        """Make the call of one message, which is charged, timed and limited by itself."""
        now = time.monotonic()
        deadline = self._call.deadline or now + self._limits.timeout
        return replace(
            self._call, charge=charge, timings=Timings(), usage_tokens=0, started=now, deadline=deadline
        )

    def _book(self, call: Call) -> None:
        """Add a message's figures to those of the whole call, for metrics and logs."""
        whole = self._call
        whole.model = call.model
        whole.usage_tokens += call.usage_tokens
        whole.timings.fetch += call.timings.fetch
        whole.timings.decode += call.timings.decode
        whole.timings.tokenize += call.timings.tokenize
        whole.timings.queue += call.timings.queue
        whole.timings.inference += call.timings.inference


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
            model=result.model, usage=used(result), timings=timings(call.timings)
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

"""Embedding a stream of single inputs: many at a time, answered in order, in bounded memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from searchfoundation.v1 import embed_pb2

from services.core.call import Call, Timings
from services.core.errors import ErrorCode, ServiceError
from services.core.serving.failure import rpc_status
from services.core.serving.messages import timings
from services.embed.logic import Embedder
from services.embed.messages import embeddings, request_fields, stream_location, usage
from services.embed.parsing import RequestParser

logger = logging.getLogger(__name__)

_Answer = asyncio.Task[embed_pb2.EmbedStreamResponse]


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
                    yield await answer
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
    ) -> embed_pb2.EmbedStreamResponse:
        call = self._message_call()
        try:
            result = await self._embed(request, model, options, call)
        except ServiceError as error:
            return self._failure(index, request.id, error)
        except Exception:  # of one message only; the others go on
            logger.exception("message of a stream failed", extra={"fields": {"request_id": call.request_id}})
            return self._failure(index, request.id, ServiceError(ErrorCode.INTERNAL_ERROR))
        self._book(call)
        return embed_pb2.EmbedStreamResponse(index=index, id=request.id, result=result)

    async def _embed(
        self, request: embed_pb2.EmbedStreamRequest, model: str, options: embed_pb2.EmbedOptions, call: Call
    ) -> embed_pb2.EmbedStreamResult:
        parsed = self._parser.parse(request_fields(model, (request.input,), options), stream_location)
        result = await self._embedder.embed(parsed, call)
        return embed_pb2.EmbedStreamResult(
            model=result.model,
            embeddings=embeddings(result),
            usage=usage(result),
            timings=timings(call.timings),
        )

    def _failure(self, index: int, id: str, error: ServiceError) -> embed_pb2.EmbedStreamResponse:
        status = rpc_status(error, self._call.request_id)
        return embed_pb2.EmbedStreamResponse(index=index, id=id, error=status)

    def _message_call(self) -> Call:
        """Make the call of one message, which is charged, timed and limited by itself."""
        now = time.monotonic()
        deadline = self._call.deadline or now + self._limits.timeout
        return replace(self._call, timings=Timings(), usage_tokens=0, started=now, deadline=deadline)

    def _book(self, call: Call) -> None:
        """Add a message's figures to those of the whole call, for metrics and logs."""
        whole = self._call
        whole.model = call.model
        whole.usage_tokens += call.usage_tokens
        whole.timings.tokenize += call.timings.tokenize
        whole.timings.queue += call.timings.queue
        whole.timings.inference += call.timings.inference

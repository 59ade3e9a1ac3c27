"""The REST door: a JSON body in, one out, or server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
import orjson
from google.api import httpbody_pb2
from searchfoundation.v1 import chat_rest_pb2_grpc

from services.chat.logic import Chat, or_heartbeats
from services.chat.parsing import ChatParser
from services.chat.responses import Envelope, usage_fields
from services.chat.types import ChatRequest
from services.core.call import Call, current_call
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.answering import Answer
from services.core.inference.sampling import Chosen
from services.core.serving.failure import http_body
from services.core.serving.rest import Body, decode, encode

Context = grpc.aio.ServicerContext[Any, Any]

_EVENTS = "text/event-stream; charset=utf-8"
_HEARTBEAT = b": still here\n\n"
_DONE = b"data: [DONE]\n\n"


class ChatRestServicer(chat_rest_pb2_grpc.ChatRestServiceServicer):
    """``ChatRestService`` over the capability."""

    def __init__(self, parser: ChatParser, chat: Chat, heartbeat_seconds: float) -> None:
        self._parser = parser
        self._chat = chat
        self._heartbeat = heartbeat_seconds

    async def ChatCompletions(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Answer ``POST /v1/chat/completions``."""
        call = current_call.get()
        parsed = self._parser.parse(await decode(request))
        if not parsed.stream:
            yield await self._whole(parsed, call)
            return
        call.headers = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
        async with aclosing(self._events(parsed, call)) as events:
            async for event in events:
                yield httpbody_pb2.HttpBody(content_type=_EVENTS, data=event)

    async def _whole(self, request: ChatRequest, call: Call) -> httpbody_pb2.HttpBody:
        async with self._chat.answer(request, call) as answer:
            envelope = Envelope(request.model, answer.text_of)
            pieces = [piece async for piece in answer]
            text = "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens]
            usage = usage_fields(answer.prompt, answer.said, answer.shared)
            shown = _shown(request, tokens)
            return encode(envelope.completion(text, shown, answer.finish or "stop", usage))

    async def _events(self, request: ChatRequest, call: Call) -> AsyncGenerator[bytes]:
        begun = False
        try:
            async with self._chat.answer(request, call) as answer:
                async for event in self._chunks(request, answer):
                    begun = True
                    yield event
        except ServiceError as error:
            if begun:
                yield _event(http_body(error, call.request_id))
            raise
        except Exception:
            if begun:
                yield _event(http_body(ServiceError(ErrorCode.INTERNAL_ERROR), call.request_id))
            raise

    async def _chunks(self, request: ChatRequest, answer: Answer) -> AsyncGenerator[bytes]:
        envelope = Envelope(request.model, answer.text_of)
        first = _event(envelope.chunk({"role": "assistant", "content": ""}))
        held: list[Chosen] = []
        async with aclosing(or_heartbeats(aiter(answer), self._heartbeat)) as pieces:
            async for piece in pieces:
                if first:
                    yield first
                    first = b""
                if piece is None:
                    yield _HEARTBEAT
                    continue
                held += piece.tokens
                if piece.text:
                    yield _event(envelope.chunk({"content": piece.text}, _shown(request, held)))
                    held = []
                if piece.finish is not None:
                    yield _event(envelope.chunk({}, _shown(request, held) if held else None, piece.finish))
                answer.sent(piece)
        if request.include_usage:
            yield _event(envelope.usage_chunk(usage_fields(answer.prompt, answer.said, answer.shared)))
        yield _DONE


def _shown(request: ChatRequest, tokens: list[Chosen]) -> list[Chosen] | None:
    return None if request.options.sampling.top_logprobs is None else tokens


def _event(data: dict[str, Any] | str) -> bytes:
    return b"data: %b\n\n" % (data.encode() if isinstance(data, str) else orjson.dumps(data))

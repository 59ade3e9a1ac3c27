"""The typed gRPC door."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import orjson
from searchfoundation.v1 import chat_pb2, chat_pb2_grpc, common_pb2

from services.chat.logic import Chat
from services.chat.parsing import ChatParser
from services.core.call import Call, current_call
from services.core.errors import FieldError, validation_error
from services.core.inference.answering import Answer
from services.core.inference.sampling import Chosen
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path, timings

Context = grpc.aio.ServicerContext[Any, Any]

_NUMBERS = (
    *("max_tokens", "temperature", "top_p", "top_k"),
    *("presence_penalty", "frequency_penalty", "seed", "top_logprobs"),
)


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    """``ChatService`` over the capability."""

    def __init__(self, parser: ChatParser, chat: Chat) -> None:
        self._parser = parser
        self._chat = chat

    async def Complete(  # noqa: N802 - named by the contract
        self, request: chat_pb2.ChatRequest, context: Context
    ) -> chat_pb2.ChatResponse:
        """Answer in one piece."""
        call = current_call.get()
        parsed = self._parser.parse(request_fields(request), location)
        async with self._chat.answer(parsed, call) as answer:
            pieces = [piece async for piece in answer]
            logprobs = parsed.options.sampling.top_logprobs is not None
            tokens = [token for piece in pieces for token in piece.tokens] if logprobs else []
            return chat_pb2.ChatResponse(
                model=parsed.model,
                text="".join(piece.text for piece in pieces),
                finish_reason=answer.finish or "",
                logprobs=_logprobs(tokens, answer),
                usage=_usage(answer),
                timings=timings(call.timings),
            )

    async def CompleteStream(  # noqa: N802 - named by the contract
        self, request: chat_pb2.ChatRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ChatChunk]:
        """Answer as it comes."""
        call = current_call.get()
        parsed = self._parser.parse(request_fields(request), location)
        async with self._chat.answer(parsed, call) as answer:
            async for piece in answer:
                tokens = piece.tokens if parsed.options.sampling.top_logprobs is not None else ()
                chunk = chat_pb2.ChatChunk(text=piece.text, logprobs=_logprobs(tokens, answer))
                if piece.finish is not None:
                    _conclude(chunk, parsed.model, answer, call)
                if piece.text or tokens or piece.finish is not None:
                    yield chunk
                answer.sent(piece)


def request_fields(request: chat_pb2.ChatRequest) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    options = request.options
    fields: dict[str, Any] = {"messages": [_message(message) for message in request.messages]}
    if request.model:
        fields["model"] = request.model
    for name in _NUMBERS:
        if options.HasField(name):  # type: ignore[arg-type]  (the names of optional fields)
            fields[name] = getattr(options, name)
    if options.stop:
        fields["stop"] = list(options.stop)
    if options.HasField("top_logprobs"):
        fields["logprobs"] = True
    form = options.WhichOneof("format")
    if form == "json_object" and options.json_object:
        fields["response_format"] = {"type": "json_object"}
    elif form == "json_schema":
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": _schema(options)}}
    return fields


def location(_model: str | None, at: Location) -> str:
    """Path of a field of ``ChatRequest``, for example ``messages[1].parts[0]`` or ``options.top_p``."""
    head, *rest = at
    name = str(head)
    if name == "messages":
        return field_path(name, ["parts" if step == "content" else step for step in rest])
    return name if name == "model" else field_path(f"options.{name}", rest)


def _schema(options: chat_pb2.ChatOptions) -> dict[str, Any]:
    try:
        schema: Any = orjson.loads(options.json_schema)
    except ValueError as error:
        message = f"Input should be a JSON schema: {error}"
        raise validation_error([FieldError("options.json_schema", message, "json_invalid")]) from None
    if not isinstance(schema, dict):
        message = "Input should be a JSON schema that is an object"
        raise validation_error([FieldError("options.json_schema", message, "dict_type")])
    return schema  # pyright: ignore[reportUnknownVariableType]


def _message(message: chat_pb2.ChatMessage) -> dict[str, Any]:
    def part(each: common_pb2.ContentPart) -> Any:
        value = content_value(each)
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return next(iter(value.values()), value)

    return {"role": message.role, "content": [part(each) for each in message.parts]}


def _conclude(chunk: chat_pb2.ChatChunk, model: str, answer: Answer, call: Call) -> None:
    chunk.finish_reason = answer.finish or ""
    chunk.model = model
    chunk.usage.CopyFrom(_usage(answer))
    chunk.timings.CopyFrom(timings(call.timings))


def _usage(answer: Answer) -> common_pb2.Usage:
    prompt = answer.prompt
    return common_pb2.Usage(
        total_tokens=prompt.total + answer.said,
        prompt_tokens=prompt.total,
        image_tokens=prompt.image or None,
        output_tokens=answer.said,
    )


def _logprobs(tokens: Sequence[Chosen], answer: Answer) -> list[chat_pb2.TokenLogprob]:
    def entry(id: int, logprob: float) -> chat_pb2.TokenLogprob:
        return chat_pb2.TokenLogprob(token=answer.text_of(id), logprob=logprob)

    entries: list[chat_pb2.TokenLogprob] = []
    for token in tokens:
        each = entry(token.id, token.logprob)
        each.top.extend(entry(id, logprob) for id, logprob in token.likely)
        entries.append(each)
    return entries

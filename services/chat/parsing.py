"""From what a caller sent to a ``ChatRequest``, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.chat.schemas import ChatCompletionRequest, Message, ResponseFormat, request_schema
from services.chat.types import ChatRequest
from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.inference.answering import AnswerOptions, Turn
from services.core.inference.sampling import Sampling
from services.core.requests.parsing import Locate, ModelSchemas, rest_location


class ChatParser:
    """Checks requests for the models that a process serves; ``max_answer`` bounds answers in tokens."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_answer: int) -> None:
        schemas = {
            spec.id: request_schema(spec, max_answer) for spec in served if spec.supports(Capability.CHAT)
        }
        self._schemas = ModelSchemas(catalog, schemas)

    def parse(self, fields: dict[str, Any], locate: Locate = rest_location) -> ChatRequest:
        """Check the fields of a request; raises ``ServiceError`` as ``ModelSchemas.check`` does."""
        return _to_request(*self._schemas.check(fields, locate))


def _to_request(model: str, checked: ChatCompletionRequest) -> ChatRequest:
    values = vars(checked)
    messages: list[Message] = values["messages"]
    seed: int | None = checked.seed
    options = AnswerOptions(
        most=values["max_completion_tokens"] or values["max_tokens"],
        sampling=Sampling(
            temperature=checked.temperature or 0.0,
            top_p=1.0 if checked.top_p is None else checked.top_p,
            top_k=checked.top_k or 0,
            presence_penalty=checked.presence_penalty or 0.0,
            frequency_penalty=checked.frequency_penalty or 0.0,
            top_logprobs=(checked.top_logprobs or 0) if checked.logprobs else None,
        ),
        seed=seed,
        stops=checked.stop or (),
        schema=_schema(checked.response_format),
    )
    usage = checked.stream_options is not None and bool(checked.stream_options.include_usage)
    return ChatRequest(
        model=model,
        turns=tuple(Turn(role, parts) for role, parts in messages),
        options=options,
        stream=bool(checked.stream),
        include_usage=usage,
    )


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    return {"type": "object"} if form.json_schema is None else form.json_schema.schema_

"""What a body of ``POST /v1/chat/completions`` may hold, one class per model, made from the catalogue.

The same classes check requests and describe them in the served OpenAPI document. Unknown fields are ignored,
``null`` stands for the default; what clients of OpenAI's API may ask for and nobody here does is refused by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SkipValidation,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Media
from services.core.requests.content import Location, RefusedItem, read_each, refuse
from services.core.requests.fields import Flag, Whole, class_name, without_default

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_STOPS, _LONGEST_STOP = 4, 1000

_UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "tools": lambda value: not value,
    "functions": lambda value: not value,
    "tool_choice": lambda value: value in ("none", "auto"),
    "function_call": lambda value: value in ("none", "auto"),
    "audio": lambda value: not value,
    "modalities": lambda value: value == ["text"],
    "logit_bias": lambda value: not value,
    "prediction": lambda value: not value,
    "web_search_options": lambda value: False,
}
"""Fields of OpenAI's API that do nothing here, and which values of them ask for just that."""


class TextPart(BaseModel):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where an image is. ``detail`` is taken and has no effect."""

    url: str = Field(description="An http or https URL, or a `data:` URI.", min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class StreamOptions(BaseModel):
    """What a stream holds besides."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: Flag = Field(False, description="Whether one more chunk tells the usage, before the end.")


class JsonSchema(BaseModel):
    """A schema by name. ``strict`` is taken and has no effect: answers are always held to the schema."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, populate_by_name=True)

    name: str = Field("answer", max_length=64)
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer is held to, token by token."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "'json_schema' is required with this type")
        return self


class ChatCompletionRequest(BaseModel):
    """What every model takes. ``model`` and ``messages`` come with the subclass of a model."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    temperature: float | None = Field(
        0.0, ge=0, le=2, description="0 takes the most likely token each time; higher is more varied."
    )
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="Of the most likely tokens, as few as make up this much."
    )
    top_k: Annotated[int, Field(ge=0), Whole] | None = Field(
        0, description="Of the most likely tokens, this many; 0 is all."
    )
    presence_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken off the logits of tokens that the answer has."
    )
    frequency_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken off for each time that the answer has a token."
    )
    seed: Annotated[int, Field(), Whole] | None = Field(
        None,
        json_schema_extra=without_default,
        description="The same seed and request give the same answer. Another one each time when unset.",
    )
    stop: Annotated[
        Any, PlainValidator(lambda value: _stops(value), json_schema_input_type=str | list[str])
    ] = Field(
        None,
        json_schema_extra=without_default,
        description=f"A text, or up to {_MOST_STOPS}, each of which ends the answer and is not part of it. "
        f"At most {_LONGEST_STOP} characters each.",
    )
    logprobs: Flag = Field(False, description="Whether tokens come with their log probabilities.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = Field(
        0, description="With `logprobs`: how many of the most likely tokens are told of each."
    )
    response_format: ResponseFormat | None = Field(
        None, json_schema_extra=without_default, description="What the answer is held to."
    )
    stream: Flag = Field(False, description="Whether the answer comes as server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, json_schema_extra=without_default, description="With `stream`: what it holds besides."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            sent = cast("dict[str, Any]", fields)
            for name, harmless in _UNSUPPORTED.items():
                if (value := sent.get(name)) is not None and not harmless(value):
                    raise _unsupported(name, value)
        return fields


def request_schema(spec: ModelSpec, max_answer: int) -> type[ChatCompletionRequest]:
    """Make the request class of one model; ``max_answer`` bounds answers in tokens."""
    length: Any = Annotated[int, Field(ge=1, le=max_answer), Whole]
    described = f"Longest answer in tokens, up to {max_answer}."
    messages = PlainValidator(_messages_parser(spec), json_schema_input_type=list[ChatMessage])
    fields: dict[str, Any] = {
        "model": (SkipValidation[Literal[spec.id]], Field(description="Id of the model.")),
        "messages": (Annotated[Any, messages], Field(description="The conversation, the oldest turn first.")),
        "max_completion_tokens": (
            length | None,
            Field(None, json_schema_extra=without_default, description=described),
        ),
        "max_tokens": (
            length | None,
            Field(None, json_schema_extra=without_default, description="The older name of the same."),
        ),
    }
    return create_model(
        class_name(spec, "ChatCompletionRequest"),
        __base__=ChatCompletionRequest,
        __doc__=f"Conversations with {spec.id}: up to {spec.context_length} tokens with the answer.",
        **fields,
    )


Message = tuple[str, tuple[str | Media, ...]]
"""A role, and what it says."""


def _messages_parser(spec: ModelSpec) -> Callable[[object], list[Message]]:
    def parse(value: object) -> list[Message]:
        if not isinstance(value, list):
            raise PydanticCustomError("list_type", "Input should be a valid list")
        if not value:
            raise PydanticCustomError("too_short", "A conversation has at least one message.")
        return read_each(cast("list[object]", value), lambda item, at: _message(item, at, spec))

    return parse


def _message(item: object, at: Location, spec: ModelSpec) -> Message:
    if not isinstance(item, dict):
        refuse(at, item, "dict_type", "Input should be a valid dictionary")
    fields = cast("dict[str, object]", item)
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse((*at, "role"), role, "enum", "Input should be {roles}", roles=_listed(list(_ROLES)))
    content = fields.get("content")
    if isinstance(content, str):
        return _ROLES[role], (content,)
    if content is None and role == "assistant":
        return _ROLES[role], ()
    if not isinstance(content, list):
        message = "Input should be a string or a list of parts"
        refuse((*at, "content"), content, "missing" if content is None else "string_type", message)
    parts = cast("list[object]", content)
    return _ROLES[role], tuple(_part(part, (*at, "content", i), spec) for i, part in enumerate(parts))


def _part(item: object, at: Location, spec: ModelSpec) -> str | Media:
    if isinstance(item, Media):  # of the typed door
        if item.kind not in spec.modalities:
            refuse(at, str(item.kind), "unsupported_modality", _modality(spec, item.kind))
        return item
    if not isinstance(item, dict):
        refuse(at, item, "dict_type", "Input should be a part: an object with 'type'")
    fields = cast("dict[str, object]", item)
    kind = fields.get("type")
    if kind == "text":
        text = fields.get("text")
        if not isinstance(text, str):
            raise RefusedItem(InitErrorDetails(type="string_type", loc=(*at, "text"), input=text))
        return text
    if kind != "image_url":
        refuse((*at, "type"), kind, "enum", "Input should be 'text' or 'image_url'")
    if Modality.IMAGE not in spec.modalities:
        refuse(at, kind, "unsupported_modality", _modality(spec, Modality.IMAGE))
    at, source = (*at, "image_url"), fields.get("image_url")
    if isinstance(source, dict):
        at, source = (*at, "url"), cast("dict[str, object]", source).get("url")
    if not isinstance(source, str):
        raise RefusedItem(InitErrorDetails(type="string_type", loc=at, input=source))
    if not source:
        refuse(at, source, "string_too_short", "String should have at least 1 character")
    return Media(Modality.IMAGE, source)


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = cast("list[object]", value) if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError(
            "string_type", "Input should be a text, or a list of texts, none of them empty"
        )
    if any(len(text) > _LONGEST_STOP for text in cast("list[str]", texts)):
        message = "Texts should have at most {most} characters"
        raise PydanticCustomError("string_too_long", message, {"most": _LONGEST_STOP})
    if len(texts) > _MOST_STOPS:
        raise PydanticCustomError("too_long", "Input should have at most {most} texts", {"most": _MOST_STOPS})
    return tuple(cast("list[str]", texts))


def _unsupported(name: str, value: Any) -> Exception:
    from pydantic import ValidationError

    error = PydanticCustomError("unsupported", "This server does not do that: leave the field out")
    return ValidationError.from_exception_data(
        "request", [InitErrorDetails(type=error, loc=(name,), input=value)]
    )


def _modality(spec: ModelSpec, kind: Modality) -> Any:
    return f"Model '{spec.id}' does not take '{kind}'."


def _listed(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"

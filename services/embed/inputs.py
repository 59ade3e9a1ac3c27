"""The ``input`` field: a string, an object with ``text``, or a list of both.

A list is checked by hand: the union of pydantic costs about a microsecond per item and names the branches
it tried instead of the item at fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, PlainValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]

MAX_ERRORS = 10
"""Bad items named in one answer."""

_MEDIA_KEYS = ("image", "audio", "video", "pdf", "content", "url", "bytes", "image_url")


class TextDoc(BaseModel):
    """A text as an object."""

    text: str = Field(description="The text.")


def input_field(model: str, max_items: int) -> Any:
    """Build the annotation of ``input`` for a model that takes text only.

    The value becomes a ``list[str]``. Errors lie at ``()`` for the list as a whole, at ``(i,)`` for an
    item of it and at ``(..., "text")`` inside an object.
    """
    items = Annotated[list[str | TextDoc], Field(min_length=1, max_length=max_items)]
    return Annotated[
        list[str], PlainValidator(_parser(model, max_items), json_schema_input_type=str | TextDoc | items)
    ]


def _parser(model: str, max_items: int) -> Callable[[object], list[str]]:
    def parse(value: object) -> list[str]:
        if type(value) is str:
            return [value]
        if isinstance(value, list):
            return _texts(cast("list[object]", value), model, max_items)
        text = _text(value, (), model)
        if isinstance(text, str):
            return [text]
        raise _failure([text])

    return parse


def _texts(items: list[object], model: str, max_items: int) -> list[str]:
    if not items:
        raise PydanticCustomError("too_short", "Input list cannot be empty. Provide at least one item.")
    if len(items) > max_items:
        raise PydanticCustomError(
            "too_long", "Each input list can contain at most {max_items} items.", {"max_items": max_items}
        )
    kinds = set(map(type, items))
    if kinds == {str}:
        return cast("list[str]", items)
    if int in kinds or list in kinds:
        _refuse_token_ids(items)
    texts: list[str] = []
    errors: list[InitErrorDetails] = []
    for position, item in enumerate(items):
        text = _text(item, (position,), model)
        if isinstance(text, str):
            texts.append(text)
        else:
            errors.append(text)
            if len(errors) == MAX_ERRORS:
                break
    if errors:
        raise _failure(errors)
    return texts


def _text(item: object, at: Location, model: str) -> str | InitErrorDetails:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        return _error(at, item, "text_type", "Input should be a string or an object with 'text'")
    doc = cast("dict[str, object]", item)
    text = doc.get("text")
    if isinstance(text, str):
        return text
    if "text" in doc:
        return InitErrorDetails(type="string_type", loc=(*at, "text"), input=text)
    for key in _MEDIA_KEYS:
        if key in doc:
            message = "Model '{model}' takes text only, not '{key}'."
            return _error(at, doc, "unsupported_modality", message, model=model, key=key)
    return InitErrorDetails(type="missing", loc=(*at, "text"), input=doc)


def _refuse_token_ids(items: list[object]) -> None:
    """Raise where the list is one text as token ids, or several of them, as OpenAI clients may send."""
    arrays = [cast("list[object]", item) for item in items if isinstance(item, list)] or [items]
    if any(array and all(type(token) is int for token in array) for array in arrays):
        raise PydanticCustomError(
            "token_ids_not_supported",
            "Arrays of token ids are not supported. Send the text itself "
            "(with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False).",
        )


def _error(at: Location, value: object, kind: Any, message: Any, **context: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError(kind, message, context), loc=at, input=value)


def _failure(errors: list[InitErrorDetails]) -> ValidationError:
    """Pack errors so that the enclosing model puts its own location in front of each."""
    return ValidationError.from_exception_data("input", errors)

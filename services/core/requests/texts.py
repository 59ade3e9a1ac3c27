"""Texts in a request: a string or an object with ``text``.

Lists are checked by hand: the union of pydantic costs about a microsecond per item and names the branches
it tried instead of the item at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

T = TypeVar("T")
Location = tuple[str | int, ...]

MAX_ERRORS = 10
"""Bad items named in one answer."""

_MEDIA_KEYS = ("image", "audio", "video", "pdf", "content", "url", "bytes", "image_url")


class TextDoc(BaseModel):
    """A text as an object."""

    text: str = Field(description="The text.")


class RefusedItem(Exception):  # noqa: N818 - no error of the program's; it never leaves the parsing
    """An item that is not what it should be."""

    def __init__(self, details: InitErrorDetails) -> None:
        super().__init__(details)
        self.details = details


def read_text(item: object, at: Location, model: str) -> str:
    """Return the text of a string or object.

    Raises RefusedItem, located at ``at`` or at ``text`` inside; media are refused in the name of ``model``,
    which takes texts only.
    """
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        refuse(at, item, "text_type", "Input should be a string or an object with 'text'")
    doc = cast("dict[str, object]", item)
    text = doc.get("text")
    if isinstance(text, str):
        return text
    if "text" in doc:
        raise RefusedItem(InitErrorDetails(type="string_type", loc=(*at, "text"), input=text))
    for key in _MEDIA_KEYS:
        if key in doc:
            message = "Model '{model}' takes text only, not '{key}'."
            refuse(at, doc, "unsupported_modality", message, model=model, key=key)
    raise RefusedItem(InitErrorDetails(type="missing", loc=(*at, "text"), input=doc))


def read_one(item: object, read: Callable[[object, Location], T]) -> T:
    """Read a value that is no list; raises pydantic's ValidationError for the enclosing model to locate."""
    try:
        return read(item, ())
    except RefusedItem as refused:
        raise _failure([refused.details]) from None


def read_each(items: Sequence[object], read: Callable[[object, Location], T]) -> list[T]:
    """Read every item of a list; raises pydantic's ValidationError naming the first bad ones by position."""
    values: list[T] = []
    errors: list[InitErrorDetails] = []
    for position, item in enumerate(items):
        try:
            values.append(read(item, (position,)))
        except RefusedItem as refused:
            errors.append(refused.details)
            if len(errors) == MAX_ERRORS:
                break
    if errors:
        raise _failure(errors)
    return values


def refuse(at: Location, value: object, kind: Any, message: Any, **context: Any) -> NoReturn:
    """Raise RefusedItem with words of our own."""
    error = PydanticCustomError(kind, message, context)
    raise RefusedItem(InitErrorDetails(type=error, loc=at, input=value))


def _failure(errors: list[InitErrorDetails]) -> ValidationError:
    """Pack errors so that the enclosing model puts its own location in front of each."""
    return ValidationError.from_exception_data("input", errors)

"""The ``input`` field: a string, an object with ``text``, or a list of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from services.core.requests.texts import TextDoc, read_each, read_one, read_text


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
    read = partial(read_text, model=model)

    def parse(value: object) -> list[str]:
        if type(value) is str:
            return [value]
        if not isinstance(value, list):
            return [read_one(value, read)]
        items = cast("list[object]", value)
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
        return read_each(items, read)

    return parse


def _refuse_token_ids(items: list[object]) -> None:
    """Raise where the list is one text as token ids, or several of them, as OpenAI clients may send."""
    arrays = [cast("list[object]", item) for item in items if isinstance(item, list)] or [items]
    if any(array and all(type(token) is int for token in array) for array in arrays):
        raise PydanticCustomError(
            "token_ids_not_supported",
            "Arrays of token ids are not supported. Send the text itself "
            "(with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False).",
        )

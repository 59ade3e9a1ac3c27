"""The ``input`` field: a string, an object with ``text`` (or media, by the model), or a list of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from services.core.content import Content
from services.core.requests.content import Accepted, read_content, read_contents, read_one


def input_field(accepted: Accepted, max_items: int) -> Any:
    """Build the annotation of ``input``; the value becomes a ``list[Content]``.

    Errors lie at ``()`` for the list as a whole, at ``(i,)`` for an item of it and at ``(..., "text")`` (or
    another field) inside an object.
    """
    items = Annotated[list[accepted.schema(listed=True)], Field(min_length=1, max_length=max_items)]
    validator = PlainValidator(_parser(accepted, max_items), json_schema_input_type=accepted.schema() | items)
    return Annotated[Any, validator]


def _parser(accepted: Accepted, max_items: int) -> Callable[[object], list[Content]]:
    read = partial(read_content, accepted=accepted)

    def parse(value: object) -> list[Content]:
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
        if int in kinds or list in kinds:
            _refuse_token_ids(items)
        return read_contents(items, accepted)

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

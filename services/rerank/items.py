"""The ``query`` and ``documents`` fields: strings, objects with ``text``, for some models with ``image``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError, PydanticKnownError

from services.core.content import Content
from services.core.requests.content import Accepted, read_content, read_contents, read_one


def query_field(accepted: Accepted) -> Any:
    """Build the annotation of ``query``; the value becomes a ``Content``."""
    parser = partial(read_one, read=partial(read_content, accepted=accepted))
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=accepted.schema())]


def documents_field(accepted: Accepted, max_documents: int) -> Any:
    """Build the annotation of ``documents``; the value becomes a ``list[Content]``.

    Errors lie at ``(i,)`` for an item and at ``(i, "text")`` or ``(i, "image")`` inside an object.
    """
    items = Annotated[list[accepted.schema(listed=True)], Field(min_length=1, max_length=max_documents)]
    parser = _documents_parser(accepted, max_documents)
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=items)]


def _documents_parser(accepted: Accepted, max_documents: int) -> Callable[[object], list[Content]]:
    def parse(value: object) -> list[Content]:
        if not isinstance(value, list):
            raise PydanticKnownError("list_type")
        items = cast("list[object]", value)
        if not items:
            raise PydanticCustomError(
                "too_short", "Documents cannot be empty. Provide at least one document."
            )
        if len(items) > max_documents:
            raise PydanticCustomError(
                "too_long",
                "A request can contain at most {max_documents} documents.",
                {"max_documents": max_documents},
            )
        return read_contents(items, accepted)

    return parse

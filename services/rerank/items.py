"""The ``query`` and ``documents`` fields: strings, objects with ``text``, for some models with ``image``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, PlainValidator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from services.core.catalog.types import Modality, ModelSpec
from services.core.requests.texts import (
    Location,
    RefusedItem,
    TextDoc,
    read_each,
    read_one,
    read_text,
    refuse,
)
from services.rerank.types import Image, Item

_Reader = Callable[[object, Location], Item]

_IMAGE_URI = "data:image/"
"""Some clients send an image as a bare string."""


class ImageDoc(BaseModel):
    """An image as an object."""

    image: str = Field(description="An http or https URL, or the file in base64.", min_length=1)


def query_field(spec: ModelSpec) -> Any:
    """Build the annotation of ``query``; the value becomes an ``Item``."""
    parser = partial(read_one, read=_reader(spec))
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=_item(spec))]


def documents_field(spec: ModelSpec, max_documents: int) -> Any:
    """Build the annotation of ``documents``; the value becomes a ``list[Item]``.

    Errors lie at ``(i,)`` for an item and at ``(i, "text")`` or ``(i, "image")`` inside an object.
    """
    items = Annotated[list[_item(spec)], Field(min_length=1, max_length=max_documents)]
    parser = _documents_parser(_reader(spec), max_documents)
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=items)]


def _item(spec: ModelSpec) -> Any:
    return str | TextDoc | ImageDoc if Modality.IMAGE in spec.modalities else str | TextDoc


def _reader(spec: ModelSpec) -> _Reader:
    if Modality.IMAGE in spec.modalities:
        return partial(_read_text_or_image, model=spec.id)
    return partial(read_text, model=spec.id)


def _documents_parser(read: _Reader, max_documents: int) -> Callable[[object], list[Item]]:
    def parse(value: object) -> list[Item]:
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
        return read_each(items, read)

    return parse


def _read_text_or_image(item: object, at: Location, model: str) -> Item:
    if isinstance(item, str) and item.startswith(_IMAGE_URI):
        return Image(item)
    if not isinstance(item, dict) or "text" in item or "image" not in item:
        return read_text(cast("object", item), at, model)
    source = cast("dict[str, object]", item)["image"]
    if not isinstance(source, str):
        raise RefusedItem(InitErrorDetails(type="string_type", loc=(*at, "image"), input=source))
    if not source:
        refuse((*at, "image"), source, "string_too_short", "String should have at least 1 character")
    return Image(source)

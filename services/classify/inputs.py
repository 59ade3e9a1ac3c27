"""The fields of requests: inputs, labels and training examples, checked by hand for speed and for places."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn, cast

from pydantic import BaseModel, Field, PlainValidator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from services.classify.types import LabelGroup
from services.core.catalog.types import Modality
from services.core.content import Content
from services.core.requests.content import (
    Accepted,
    Location,
    RefusedItem,
    read_content,
    read_contents,
    read_each,
    read_one,
    refuse,
)

MAX_LABELS = 512
MAX_GROUPS = 8
MAX_GROUP_LABELS = 64
MIN_LABELS = 2
MAX_LABEL_LENGTH = 2048
"""Characters. Answers repeat each label for each input."""

ListedLabels = Annotated[
    list[Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]],
    Field(min_length=MIN_LABELS, max_length=MAX_LABELS),
]
GroupLabels = Annotated[
    list[Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]],
    Field(min_length=MIN_LABELS, max_length=MAX_GROUP_LABELS),
]
GroupedLabels = Annotated[dict[str, GroupLabels], Field(min_length=1, max_length=MAX_GROUPS)]


class TextTrainingItem(BaseModel):
    """A labelled text."""

    text: str = Field(description="The text.")
    label: str = Field(description="What it is an example of.", max_length=MAX_LABEL_LENGTH)


class ImageTrainingItem(BaseModel):
    """A labelled image."""

    image: str = Field(description="An http or https URL, or the file in base64.", min_length=1)
    label: str = Field(description="What it is an example of.", max_length=MAX_LABEL_LENGTH)


Example = tuple[Content, str]
"""A content and its label."""


def input_field(accepted: Accepted, max_items: int) -> Any:
    """Build the annotation of ``input`` of a classify request; the value becomes a ``list[Content]``.

    Errors lie at ``()`` for the list as a whole, at ``(i,)`` for an item and at ``(..., "text")`` (or another
    field) inside an object.
    """
    items = Annotated[list[accepted.schema(listed=True)], Field(min_length=1, max_length=max_items)]
    validator = PlainValidator(
        _contents(accepted, max_items), json_schema_input_type=accepted.schema() | items
    )
    return Annotated[Any, validator]


def examples_field(accepted: Accepted, max_items: int, *, least: int, one: bool) -> Any:
    """Build the annotation of ``input`` of a train request; the value becomes a ``list[Example]``.

    ``one`` allows an example outside a list.
    """
    item: Any = TextTrainingItem
    if Modality.IMAGE in accepted.kinds:
        item = item | ImageTrainingItem
    items: Any = Annotated[list[item], Field(min_length=least, max_length=max_items)]
    read = partial(_read_example, accepted=accepted)
    parse = _examples(read, max_items, least=least, one=one)
    shown = item | items if one else items
    return Annotated[list[Example], PlainValidator(parse, json_schema_input_type=shown)]


def parse_labels(value: object) -> tuple[LabelGroup, ...] | LabelGroup:
    """Read labels: a list becomes one group without a name, an object as many groups as it has."""
    if isinstance(value, list):
        labels = cast("list[object]", value)
        if (wrong := _wrong_number(labels, MAX_LABELS)) is not None:
            raise wrong
        return LabelGroup(tuple(read_each(labels, _read_label)))
    if not isinstance(value, dict):
        raise PydanticCustomError(
            "labels_type", "Input should be a list of labels or an object of such lists"
        )
    groups = cast("dict[str, object]", value)
    if not groups:
        raise PydanticCustomError("too_short", "Labels should have at least 1 group.")
    if len(groups) > MAX_GROUPS:
        raise PydanticCustomError(
            "too_long", "Labels can have at most {limit} groups.", {"limit": MAX_GROUPS}
        )
    return tuple(read_each(tuple(groups.items()), _read_group))


LabelsField = Annotated[
    tuple[LabelGroup, ...] | LabelGroup,
    PlainValidator(parse_labels, json_schema_input_type=ListedLabels | GroupedLabels),
]


def _read_group(group: object, _position: Location) -> LabelGroup:
    """Read one group from its name and labels; the name is its location."""
    name, value = cast("tuple[str, object]", group)
    if len(name) > MAX_LABEL_LENGTH:
        _refuse_long((name[:MAX_LABEL_LENGTH],), name)
    if not isinstance(value, list):
        raise RefusedItem(InitErrorDetails(type="list_type", loc=(name,), input=value))
    labels = cast("list[object]", value)
    if (wrong := _wrong_number(labels, MAX_GROUP_LABELS)) is not None:
        raise RefusedItem(InitErrorDetails(type=wrong, loc=(name,), input=labels))
    return LabelGroup(tuple(_read_label(label, (name, i)) for i, label in enumerate(labels)), name)


def _wrong_number(labels: list[object], limit: int) -> PydanticCustomError | None:
    if len(labels) < MIN_LABELS:
        return PydanticCustomError("too_short", "At least {limit} labels are needed.", {"limit": MIN_LABELS})
    if len(labels) > limit:
        return PydanticCustomError("too_long", "At most {limit} labels are allowed.", {"limit": limit})
    return None


def _read_label(label: object, at: Location) -> str:
    if not isinstance(label, str):
        raise RefusedItem(InitErrorDetails(type="string_type", loc=at, input=label))
    if len(label) > MAX_LABEL_LENGTH:
        _refuse_long(at, label)
    return label


def _refuse_long(at: Location, label: str) -> NoReturn:
    message = "Label should have at most {limit} characters"
    refuse(at, label, "string_too_long", message, limit=MAX_LABEL_LENGTH)


def _contents(accepted: Accepted, max_items: int) -> Callable[[object], list[Content]]:
    read = partial(read_content, accepted=accepted)

    def parse(value: object) -> list[Content]:
        if not isinstance(value, list):
            return [read_one(value, read)]
        return read_contents(_bounded(cast("list[object]", value), 1, max_items), accepted)

    return parse


def _examples(
    read: Callable[[object, Location], Example], max_items: int, *, least: int, one: bool
) -> Callable[[object], list[Example]]:
    def parse(value: object) -> list[Example]:
        if one and isinstance(value, dict):
            return [read_one(cast("object", value), read)]
        if not isinstance(value, list):
            raise PydanticKnownError("list_type")
        return read_each(_bounded(cast("list[object]", value), least, max_items), read)

    return parse


def _read_example(item: object, at: Location, accepted: Accepted) -> Example:
    if not isinstance(item, dict):
        refuse(at, item, "example_type", "Input should be an object with 'text' and 'label'")
    example = cast("dict[str, object]", item)
    content = read_content(example, at, accepted)
    if "label" not in example:
        raise RefusedItem(InitErrorDetails(type="missing", loc=(*at, "label"), input=example))
    return content, _read_label(example["label"], (*at, "label"))


def _bounded(items: list[object], least: int, most: int) -> list[object]:
    if not items:
        raise PydanticCustomError("too_short", "Input list cannot be empty. Provide at least one item.")
    if len(items) < least:
        raise PydanticCustomError("too_short", "Input list needs at least {least} items.", {"least": least})
    if len(items) > most:
        message = "Each input list can contain at most {most} items."
        raise PydanticCustomError("too_long", message, {"most": most})
    return items

"""Requests and results of classification: what the paths of classification take and answer."""

from __future__ import annotations

import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast
from uuid import UUID

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainValidator, SkipValidation, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, Modality, ModelSpec
from services.core.content import Content, Usage
from services.core.errors import ErrorCode, ServiceError
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
from services.core.requests.fields import Whole, class_name
from services.core.requests.parsing import Locate, ModelSchemas, checked, rest_location

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_OWNERS = uuid.UUID("7f1d3c52-7c43-5b5e-9a64-2f0a5d7c1e90")


def model_mark(model: str) -> str:
    """Return the first 8 digits of the ids of a model's classifiers.

    Requests with a classifier's id name no model, so a gateway with several pools needs it in the id.
    """
    return f"{zlib.crc32(model.encode()):08x}"


def new_id(model: str) -> str:
    """Make an id with 90 random bits, which is what protects a public classifier."""
    return model_mark(model) + str(uuid.uuid4())[8:]


def parse_id(text: str) -> str | None:
    """Return the id in lower case, None for what is no UUID."""
    text = text.lower()
    return text if _UUID.fullmatch(text) else None


def owner_uuid(key_id: str) -> str:
    """Return a UUID for an owner's key id, which the REST contract wants."""
    return str(uuid.uuid5(_OWNERS, key_id))


class Access(StrEnum):
    """Who may classify with a classifier: every key that knows its id, or its owner only."""

    PUBLIC = "public"
    PRIVATE = "private"


@dataclass(frozen=True, slots=True)
class LabelGroup:
    """Labels that exclude each other; ``name`` is empty where a request has only one, unnamed group."""

    labels: tuple[str, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class ZeroShotRequest:
    """Contents to sort under labels. ``grouped`` says that the caller named groups, be it only one."""

    model: str
    contents: Sequence[Content]
    groups: tuple[LabelGroup, ...]
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class FewShotRequest:
    """Contents for a trained classifier."""

    classifier_id: str
    contents: Sequence[Content]


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """Examples for a new classifier: ``labels`` has one for each of ``contents``."""

    model: str
    contents: Sequence[Content]
    labels: Sequence[str]
    access: Access
    iterations: int


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """Further examples for a classifier; they may bring new labels."""

    classifier_id: str
    contents: Sequence[Content]
    labels: Sequence[str]
    iterations: int


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """``scores`` has one array (contents, labels) for each group, whose rows sum to 1.

    ``best`` holds the places (contents,) of the highest scores, the first of equal ones.
    """

    model: str
    groups: tuple[LabelGroup, ...]
    grouped: bool
    scores: list[Scores]
    best: list[list[int]]
    usage: Usage


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What was trained; ``samples`` counts the examples of this request."""

    classifier_id: str
    samples: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Classifier:
    """What is known of a classifier. Times are in seconds since the epoch.

    ``version`` counts trainings, the first one included; ``used_number`` calls that classified.
    """

    id: str
    owner: str
    model: str
    access: Access
    labels: tuple[str, ...]
    version: int
    used_number: int
    created_at: float
    updated_at: float
    used_at: float | None

    def open_to(self, caller: str) -> bool:
        """Whether ``caller`` may classify with it."""
        return self.access is Access.PUBLIC or self.owner == caller


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


INPUT_NAMES = ("input", "texts", "content")
"""Names callers know the input by; the first one wins."""

DEFAULT_ITERATIONS = 10
MAX_ITERATIONS = 1000

AccessName = Literal["public", "private"]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Training(_Request):
    num_iters: Annotated[int, Field(ge=1, le=MAX_ITERATIONS), Whole] | None = Field(
        DEFAULT_ITERATIONS, description="Times the examples are gone through; multiplies the tokens billed."
    )


class _NewClassifier(_Training):
    access: AccessName | None = Field(
        Access.PUBLIC.value,
        description="Who may classify: everyone who knows the id, or only the key that trains it.",
    )


def classifies(spec: ModelSpec) -> bool:
    """Whether ``/v1/classify`` serves a model."""
    return spec.supports(Capability.CLASSIFY) and Modality.TEXT in spec.classify_inputs


def trains(spec: ModelSpec) -> bool:
    """Whether ``/v1/train`` serves a model."""
    return spec.supports(Capability.CLASSIFY) and Modality.TEXT in spec.train_inputs


def _accepted(model: str, kinds: Iterable[Modality]) -> Accepted:
    return Accepted(model, frozenset(kinds) | {Modality.TEXT})


def _of_classifier(specs: Iterable[ModelSpec]) -> Accepted:
    """Return what any trained classifier may take: its model is unknown while a request is checked."""
    return _accepted("of this classifier", (kind for spec in specs for kind in spec.classify_inputs))


def zero_shot_schema(spec: ModelSpec, max_items: int) -> type[BaseModel]:
    """Make the class of a zero-shot request; ``max_items`` bounds the list form of ``input``."""
    fields: dict[str, Any] = {
        "model": _model(spec),
        "input": _inputs(_accepted(spec.id, spec.classify_inputs), max_items),
        "labels": (
            LabelsField,
            Field(
                description="Candidate labels: a list, or an object of up to 8 named groups of up to 64 "
                "labels, each of which is answered by itself."
            ),
        ),
    }
    name = class_name(spec, "ZeroShotRequest")
    doc = f"Zero-shot classification by {spec.id}."
    return create_model(name, __base__=_Request, __doc__=doc, **fields)


def few_shot_schema(specs: Iterable[ModelSpec], max_items: int) -> type[BaseModel]:
    """Make the class of a request to a trained classifier."""
    fields: dict[str, Any] = {
        "classifier_id": (str, Field(description="Id of the classifier.")),
        "input": _inputs(_of_classifier(specs), max_items),
    }
    doc = "Classification by a trained classifier."
    return create_model("FewShotRequest", __base__=_Request, __doc__=doc, **fields)


def train_schema(spec: ModelSpec, max_items: int) -> type[BaseModel]:
    """Make the class of a request for a new classifier."""
    description = f"2 to {max_items} examples with at least two different labels."
    fields: dict[str, Any] = {
        "model": _model(spec),
        "input": (
            examples_field(_accepted(spec.id, spec.train_inputs), max_items, least=2, one=False),
            Field(validation_alias=AliasChoices(*INPUT_NAMES), description=description),
        ),
    }
    name = class_name(spec, "TrainingRequest")
    doc = f"A new classifier over the vectors of {spec.id}."
    return create_model(name, __base__=_NewClassifier, __doc__=doc, **fields)


def update_schema(specs: Iterable[ModelSpec], max_items: int) -> type[BaseModel]:
    """Make the class of a request to train a classifier further."""
    description = f"An example, or a list of 1 to {max_items}. They may bring new labels."
    fields: dict[str, Any] = {
        "classifier_id": (str, Field(description="Id of the classifier.")),
        "input": (
            examples_field(_of_classifier(specs), max_items, least=1, one=True),
            Field(validation_alias=AliasChoices(*INPUT_NAMES), description=description),
        ),
    }
    doc = "Further training of a classifier of one's own."
    return create_model("UpdateTrainingRequest", __base__=_Training, __doc__=doc, **fields)


def _model(spec: ModelSpec) -> Any:
    return (SkipValidation[Literal[spec.id]], Field(description="Id of the model."))


def _inputs(accepted: Accepted, max_items: int) -> Any:
    info = Field(validation_alias=AliasChoices(*INPUT_NAMES), description=accepted.described(max_items))
    return (input_field(accepted, max_items), info)


class ClassificationUsage(BaseModel):
    """Tokens of a request, special tokens included."""

    total_tokens: int = Field(description="Tokens billed.", ge=0)
    image_tokens: int | None = Field(None, description="Those of images, if any.", ge=0)
    audio_tokens: int | None = Field(None, description="Those of sounds, if any.", ge=0)
    video_tokens: int | None = Field(None, description="Those of films, if any.", ge=0)


class ClassificationPredictionLabel(BaseModel):
    """A label and how much it fits."""

    label: str
    score: float = Field(description="From 0 to 1; the scores of a list sum to 1.", ge=0, le=1)


class ClassificationPrediction(BaseModel):
    """The result of one input. With groups of labels, every value is an object with one entry per group."""

    object: Literal["classification"] = Field(description="Always `classification`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    prediction: str | dict[str, str] = Field(description="The label with the highest score.")
    score: float | dict[str, float] = Field(description="Its score.")
    predictions: list[ClassificationPredictionLabel] | dict[str, list[ClassificationPredictionLabel]] = Field(
        description="All labels, in the order of the request or of the classifier."
    )


class ClassificationResponse(BaseModel):
    """One result per input, in the order of the inputs."""

    usage: ClassificationUsage
    data: list[ClassificationPrediction]


class TrainingResponse(BaseModel):
    """A classifier was trained and stored."""

    classifier_id: UUID = Field(description="What to classify with.")
    num_samples: int = Field(description="Examples of this request.", ge=1)
    usage: ClassificationUsage


class ClassifierSummary(BaseModel):
    """What is known of a classifier."""

    classifier_id: UUID
    user_id: UUID = Field(description="Stands for the key that owns it.")
    model: str = Field(description="Id of the model whose vectors it was trained on.")
    labels: list[str]
    access: AccessName
    updated_number: int = Field(description="Trainings, the first one included.", ge=1)
    used_number: int = Field(description="Calls that classified with it.", ge=0)
    created_at: datetime
    updated_at: datetime = Field(description="Of the last training.")
    used_at: datetime | None
    is_active: bool
    is_latest: bool
    metadata_: dict[str, Any]


class DeletedClassifier(BaseModel):
    """A classifier is gone."""

    classifier_id: UUID
    deleted: bool
    detail: str


_MAX_ANSWER_CHARACTERS = 64 << 20


class ClassifyParser:
    """Checks requests for the models that a process serves.

    Both methods raise ``ServiceError``: ``VALIDATION_ERROR`` naming the fields, ``INPUT_MODEL_NOT_FOUND`` for
    a model that is unknown or not served here.
    """

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_items: int) -> None:
        specs = tuple(served)
        zero_shot = {spec.id: zero_shot_schema(spec, max_items) for spec in specs if classifies(spec)}
        train = {spec.id: train_schema(spec, max_items) for spec in specs if trains(spec)}
        self._zero_shot = ModelSchemas(catalog, zero_shot, whole=INPUT_NAMES)
        self._train = ModelSchemas(catalog, train, whole=INPUT_NAMES)
        self._few_shot = few_shot_schema(specs, max_items)
        self._update = update_schema(specs, max_items)

    def classification(
        self, fields: dict[str, Any], locate: Locate = rest_location
    ) -> ZeroShotRequest | FewShotRequest:
        """Check a request to classify; one that names a classifier is for that, whatever else it says."""
        if names_classifier(fields):
            values = vars(checked(self._few_shot, fields, locate, whole=INPUT_NAMES))
            return FewShotRequest(values["classifier_id"], values["input"])
        model, schema = self._zero_shot.check(fields, locate)
        values = vars(schema)
        labels: LabelGroup | tuple[LabelGroup, ...] = values["labels"]
        grouped = isinstance(labels, tuple)
        groups = labels if isinstance(labels, tuple) else (labels,)
        request = ZeroShotRequest(model, values["input"], groups, grouped)
        _bound_answer(request)
        return request

    def training(
        self, fields: dict[str, Any], locate: Locate = rest_location
    ) -> TrainRequest | UpdateRequest:
        """Check a request to train; one that names a classifier updates that."""
        if names_classifier(fields):
            values = vars(checked(self._update, fields, locate, whole=INPUT_NAMES))
            contents, labels = _columns(values["input"])
            return UpdateRequest(values["classifier_id"], contents, labels, _iterations(values))
        model, schema = self._train.check(fields, locate)
        values = vars(schema)
        contents, labels = _columns(values["input"])
        access = Access(values["access"] or Access.PUBLIC)
        return TrainRequest(model, contents, labels, access, _iterations(values))


def names_classifier(fields: dict[str, Any]) -> bool:
    """Whether a request is about a trained classifier."""
    return fields.get("classifier_id") is not None


def _columns(examples: list[Example]) -> tuple[list[Content], list[str]]:
    return [content for content, _ in examples], [label for _, label in examples]


def _iterations(values: dict[str, Any]) -> int:
    return values["num_iters"] or DEFAULT_ITERATIONS


def _bound_answer(request: ZeroShotRequest) -> None:
    """Refuse labels so long that the answer, which repeats them for each input, would be huge."""
    characters = sum(len(label) for group in request.groups for label in group.labels)
    if characters * len(request.contents) > _MAX_ANSWER_CHARACTERS:
        raise ServiceError(
            ErrorCode.INPUT_INVALID,
            reason=f"The answer would repeat {characters:,} characters of labels for each of "
            f"{len(request.contents)} inputs. Send fewer inputs at a time, or shorter labels.",
        )


_RESOURCE = "Classifier"
_RETRY_AFTER = 1.0
_LONGEST_ID = 100


def not_found(classifier_id: str) -> ServiceError:
    """Say that there is no such classifier, or none for this caller: which of both is not told."""
    return ServiceError(
        ErrorCode.RESOURCE_NOT_FOUND, resource_type=_RESOURCE, resource_id=classifier_id[:_LONGEST_ID]
    )


def busy(classifier_id: str) -> ServiceError:
    """Say that another call is training the classifier."""
    return ServiceError(
        ErrorCode.CONFLICT_RESOURCE_BUSY,
        resource_type=_RESOURCE,
        resource_id=classifier_id,
        retry_after=_RETRY_AFTER,
    )


def too_few_labels() -> ServiceError:
    """Say that examples of one label teach nothing."""
    return ServiceError(ErrorCode.INPUT_INVALID_LABELS, min_labels=2)


def too_many_labels(current: int, limit: int) -> ServiceError:
    """Say that a classifier would have more labels than it may."""
    return ServiceError(ErrorCode.INPUT_LABEL_LIMIT_EXCEEDED, current=current, limit=limit)


def too_many_classifiers(current: int, limit: int) -> ServiceError:
    """Say that the caller has as many classifiers as it may."""
    return ServiceError(ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED, current=current, limit=limit)

"""From what a caller sent to a request, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.classify.inputs import Example
from services.classify.schemas import (
    DEFAULT_ITERATIONS,
    INPUT_NAMES,
    classifies,
    few_shot_schema,
    train_schema,
    trains,
    update_schema,
    zero_shot_schema,
)
from services.classify.types import (
    Access,
    FewShotRequest,
    LabelGroup,
    TrainRequest,
    UpdateRequest,
    ZeroShotRequest,
)
from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.content import Content
from services.core.errors import ErrorCode, ServiceError
from services.core.requests.parsing import Locate, ModelSchemas, checked, rest_location

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

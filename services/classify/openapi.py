"""Classification in the OpenAPI document: texts under labels, and classifiers of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.classify.schema import (
    ClassificationResponse,
    ClassifierSummary,
    DeletedClassifier,
    TrainingResponse,
    classifies,
    few_shot_schema,
    train_schema,
    trains,
    update_schema,
    zero_shot_schema,
)
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode
from services.core.openapi.parts import (
    LIMIT_HEADERS,
    Bounds,
    Chapter,
    Document,
    Operation,
    answer,
    call,
    list_answer,
    path_parameter,
)

_TAG = "Classification"
_NOT_FOUND = (ErrorCode.RESOURCE_NOT_FOUND,)
_TRAINING_ERRORS = (
    *_NOT_FOUND,
    ErrorCode.INPUT_INVALID_LABELS,
    ErrorCode.INPUT_LABEL_LIMIT_EXCEEDED,
    ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED,
    ErrorCode.CONFLICT_RESOURCE_BUSY,
)


def chapters(specs: Sequence[ModelSpec], bounds: Bounds) -> Iterator[Chapter]:
    """``/v1/classify``, ``/v1/train`` and ``/v1/classifiers`` of these models."""
    yield Chapter(
        tags={_TAG: "Sort texts under labels, known or learned."},
        operations=(_classify(specs, bounds.classify_items), _train(specs, bounds.classify_items)),
        paths=_classifiers(),
        answers=(ClassifierSummary, DeletedClassifier),
    )


def _classify(specs: Sequence[ModelSpec], max_items: int) -> Operation:
    return Operation(
        path="/v1/classify",
        name="classify",
        tag=_TAG,
        summary="Classify texts",
        description="Sorts each input under labels: the request's, or those of a trained classifier. "
        "Texts over the model's context are cut.",
        title="Classification Request",
        requests={spec.id: zero_shot_schema(spec, max_items) for spec in specs if classifies(spec)},
        answer=ClassificationResponse,
        answered="One result per input.",
        other=few_shot_schema(specs, max_items),
        errors=_NOT_FOUND,
    )


def _train(specs: Sequence[ModelSpec], max_items: int) -> Operation:
    return Operation(
        path="/v1/train",
        name="train",
        tag=_TAG,
        summary="Train a classifier",
        description="Makes a classifier from examples, or trains one of one's own further.",
        title="Training Request",
        requests={spec.id: train_schema(spec, max_items) for spec in specs if trains(spec)},
        answer=TrainingResponse,
        answered="The classifier is stored.",
        other=update_schema(specs, max_items),
        errors=_TRAINING_ERRORS,
    )


def _classifiers() -> Document:
    listed = list_answer("The classifiers of the key, oldest first.", ClassifierSummary, LIMIT_HEADERS)
    gone = answer("It is gone.", DeletedClassifier, LIMIT_HEADERS)
    one = path_parameter("classifier_id", "Id of a classifier of one's own.")
    return {
        "/v1/classifiers": {
            "get": call(_TAG, "List one's classifiers", "list_classifiers", listed),
            "post": call(_TAG, "List one's classifiers", "list_classifiers_by_post", listed),
        },
        "/v1/classifiers/{classifier_id}": {
            "delete": call(_TAG, "Delete a classifier", "delete_classifier", gone, [one], _NOT_FOUND)
        },
    }

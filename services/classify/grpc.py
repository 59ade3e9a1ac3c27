"""The typed gRPC door, and its messages from and to the plain types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from searchfoundation.v1 import classify_pb2, classify_pb2_grpc

from services.classify.few_shot import FewShot
from services.classify.schema import (
    INPUT_NAMES,
    Access,
    Classifier,
    ClassifyParser,
    ClassifyResult,
    TrainResult,
    UpdateRequest,
    ZeroShotRequest,
)
from services.classify.zero_shot import ZeroShot
from services.core.call import Call, current_call
from services.core.errors import FieldError, validation_error
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path, fill, timings, usage

ACCESSES = {
    classify_pb2.CLASSIFIER_ACCESS_UNSPECIFIED: Access.PUBLIC,
    classify_pb2.CLASSIFIER_ACCESS_PUBLIC: Access.PUBLIC,
    classify_pb2.CLASSIFIER_ACCESS_PRIVATE: Access.PRIVATE,
}
_ACCESS_NUMBERS = {access: number for number, access in ACCESSES.items() if number}


def classify_fields(request: classify_pb2.ClassifyRequest) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    fields: dict[str, Any] = {"input": [content_value(content) for content in request.inputs]}
    if request.classifier_id:
        fields["classifier_id"] = request.classifier_id
    if request.model:
        fields["model"] = request.model
    if request.groups:
        fields["labels"] = _groups(request)
    elif request.labels:
        fields["labels"] = list(request.labels)
    return fields


def train_fields(request: classify_pb2.TrainRequest) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema."""
    fields: dict[str, Any] = {
        "input": _examples(request.examples),
        "access": str(ACCESSES.get(request.access, request.access)),
    }
    if request.model:
        fields["model"] = request.model
    if request.HasField("iterations"):
        fields["num_iters"] = request.iterations
    return fields


def update_fields(request: classify_pb2.UpdateClassifierRequest) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema."""
    fields: dict[str, Any] = {
        "classifier_id": request.classifier_id,
        "input": _examples(request.examples),
    }
    if request.HasField("iterations"):
        fields["num_iters"] = request.iterations
    return fields


def classify_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``ClassifyRequest``, for example ``inputs[3].text``."""
    return _path(location, "inputs")


def train_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``TrainRequest`` or ``UpdateClassifierRequest``."""
    return _path(location, "examples")


def classifications(result: ClassifyResult) -> Iterator[classify_pb2.Classification]:
    """Render one message per text, as they are asked for."""
    columns = [
        _predictions(group.name, group.labels, scores.tolist(), best)
        for group, scores, best in zip(result.groups, result.scores, result.best, strict=True)
    ]
    for index, predictions in enumerate(zip(*columns, strict=True)):
        yield classify_pb2.Classification(index=index, predictions=predictions)


def classifier_message(classifier: Classifier) -> classify_pb2.Classifier:
    """Render what is known of a classifier."""
    used_at = classifier.used_at
    return classify_pb2.Classifier(
        id=classifier.id,
        model=classifier.model,
        labels=classifier.labels,
        access=_ACCESS_NUMBERS[classifier.access],
        trainings=classifier.version,
        uses=classifier.used_number,
        created=_timestamp(classifier.created_at),
        updated=_timestamp(classifier.updated_at),
        used=None if used_at is None else _timestamp(used_at),
    )


def _groups(request: classify_pb2.ClassifyRequest) -> dict[str, list[str]]:
    if request.labels:
        raise validation_error([FieldError("groups", "Give labels or groups, not both", "value_error")])
    groups = {group.name: list(group.labels) for group in request.groups}
    if len(groups) < len(request.groups):
        raise validation_error([FieldError("groups", "Each name may come only once", "value_error")])
    return groups


def _examples(examples: Iterable[classify_pb2.TrainingExample]) -> list[dict[str, Any]]:
    return [_example(example) for example in examples]


def _example(example: classify_pb2.TrainingExample) -> dict[str, Any]:
    value = content_value(example.content)
    content = {"text": value} if isinstance(value, str) else value
    return {**content, "label": example.label}


def _predictions(
    name: str, labels: tuple[str, ...], scores: list[list[float]], best: list[int]
) -> Iterable[classify_pb2.Prediction]:
    for row, place in zip(scores, best, strict=True):
        scored = [
            classify_pb2.ScoredLabel(label=label, score=score)
            for label, score in zip(labels, row, strict=True)
        ]
        yield classify_pb2.Prediction(group=name, label=labels[place], score=row[place], labels=scored)


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def _path(location: Location, input_name: str) -> str:
    head, *rest = location or INPUT_NAMES[:1]
    names = {INPUT_NAMES[0]: input_name, "num_iters": "iterations"}
    if head == "labels" and rest and isinstance(rest[0], str):
        names["labels"] = "groups"
    return field_path(names.get(str(head), str(head)), rest)


Context = grpc.aio.ServicerContext[Any, Any]

_LABELS_AT_ONCE = 4096
"""With their scores; takes some milliseconds to write."""


class ClassifyServicer(classify_pb2_grpc.ClassifyServiceServicer):
    """``ClassifyService`` over the capability."""

    def __init__(self, parser: ClassifyParser, zero_shot: ZeroShot, few_shot: FewShot) -> None:
        self._parser = parser
        self._zero_shot = zero_shot
        self._few_shot = few_shot

    async def Classify(  # noqa: N802 - named by the contract
        self, request: classify_pb2.ClassifyRequest, context: Context
    ) -> classify_pb2.ClassifyResponse:
        """Classify all inputs of one request."""
        call = current_call.get()
        parsed = self._parser.classification(classify_fields(request), classify_location)
        if isinstance(parsed, ZeroShotRequest):
            result = await self._zero_shot.classify(parsed, call)
        else:
            result = await self._few_shot.classify(parsed, call)
        response = classify_pb2.ClassifyResponse(
            model=result.model, usage=usage(result.usage), timings=timings(call.timings)
        )
        labels = sum(len(group.labels) for group in result.groups)
        await fill(response.classifications, classifications(result), at_once=_LABELS_AT_ONCE // labels)
        return response

    async def Train(  # noqa: N802 - named by the contract
        self, request: classify_pb2.TrainRequest, context: Context
    ) -> classify_pb2.TrainResponse:
        """Make a classifier."""
        call = current_call.get()
        parsed = self._parser.training(train_fields(request), train_location)
        assert not isinstance(parsed, UpdateRequest)
        return _trained(await self._few_shot.train(parsed, call), call)

    async def UpdateClassifier(  # noqa: N802 - named by the contract
        self, request: classify_pb2.UpdateClassifierRequest, context: Context
    ) -> classify_pb2.TrainResponse:
        """Train a classifier further."""
        call = current_call.get()
        parsed = self._parser.training(update_fields(request), train_location)
        assert isinstance(parsed, UpdateRequest)
        return _trained(await self._few_shot.update(parsed, call), call)

    async def ListClassifiers(  # noqa: N802 - named by the contract
        self, request: classify_pb2.ListClassifiersRequest, context: Context
    ) -> classify_pb2.ListClassifiersResponse:
        """List the caller's classifiers."""
        found = await self._few_shot.list(current_call.get())
        return classify_pb2.ListClassifiersResponse(classifiers=map(classifier_message, found))

    async def GetClassifier(  # noqa: N802 - named by the contract
        self, request: classify_pb2.GetClassifierRequest, context: Context
    ) -> classify_pb2.GetClassifierResponse:
        """Describe one classifier."""
        found = await self._few_shot.get(request.classifier_id, current_call.get())
        return classify_pb2.GetClassifierResponse(classifier=classifier_message(found))

    async def DeleteClassifier(  # noqa: N802 - named by the contract
        self, request: classify_pb2.DeleteClassifierRequest, context: Context
    ) -> classify_pb2.DeleteClassifierResponse:
        """Delete one classifier."""
        await self._few_shot.delete(request.classifier_id, current_call.get())
        return classify_pb2.DeleteClassifierResponse()


def _trained(result: TrainResult, call: Call) -> classify_pb2.TrainResponse:
    return classify_pb2.TrainResponse(
        classifier_id=result.classifier_id,
        samples=result.samples,
        usage=usage(result.usage),
        timings=timings(call.timings),
    )

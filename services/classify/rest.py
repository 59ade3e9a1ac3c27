"""The REST door: JSON bodies inside ``google.api.HttpBody``."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import classify_rest_pb2, classify_rest_pb2_grpc

from services.classify.few_shot import FewShot
from services.classify.schema import (
    Classifier,
    ClassifyParser,
    ClassifyResult,
    TrainRequest,
    ZeroShotRequest,
    owner_uuid,
)
from services.classify.zero_shot import ZeroShot
from services.core.call import current_call
from services.core.serving.rest import Body, decode, encode, in_slices

Context = grpc.aio.ServicerContext[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody]
DeleteContext = grpc.aio.ServicerContext[
    classify_rest_pb2.DeleteClassifierByPathRequest, httpbody_pb2.HttpBody
]

SCORE_DECIMALS = 8


class ClassifyRestServicer(classify_rest_pb2_grpc.ClassifyRestServiceServicer):
    """``ClassifyRestService`` over the capability."""

    def __init__(self, parser: ClassifyParser, zero_shot: ZeroShot, few_shot: FewShot) -> None:
        self._parser = parser
        self._zero_shot = zero_shot
        self._few_shot = few_shot

    async def Classify(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/classify``."""
        call = current_call.get()
        parsed = self._parser.classification(await decode(request))
        if isinstance(parsed, ZeroShotRequest):
            result = await self._zero_shot.classify(parsed, call)
        else:
            result = await self._few_shot.classify(parsed, call)
        return encode(await response_body(result, len(parsed.contents)))

    async def Train(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/train``."""
        call = current_call.get()
        parsed = self._parser.training(await decode(request))
        if isinstance(parsed, TrainRequest):
            result = await self._few_shot.train(parsed, call)
        else:
            result = await self._few_shot.update(parsed, call)
        return encode(
            {
                "classifier_id": result.classifier_id,
                "num_samples": result.samples,
                "usage": {"total_tokens": result.usage.total, **result.usage.of_media},
            }
        )

    async def ListClassifiers(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET`` and ``POST /v1/classifiers``."""
        return encode([summary(each) for each in await self._few_shot.list(current_call.get())])

    async def DeleteClassifier(  # noqa: N802 - named by the contract
        self, request: classify_rest_pb2.DeleteClassifierByPathRequest, context: DeleteContext
    ) -> httpbody_pb2.HttpBody:
        """Answer ``DELETE /v1/classifiers/{classifier_id}``."""
        deleted = await self._few_shot.delete(request.classifier_id, current_call.get())
        return encode({"classifier_id": deleted, "deleted": True, "detail": "Classifier deleted"})


async def response_body(result: ClassifyResult, contents: int) -> dict[str, Any]:
    """Lay out the answer for so many ``contents``; keys stand in the order of the wire."""
    labels = sum(len(group.labels) for group in result.groups)
    data = await in_slices(contents, 2 * labels, partial(response_items, result))
    return {"usage": {"total_tokens": result.usage.total, **result.usage.of_media}, "data": data}


def response_items(result: ClassifyResult, first: int, last: int) -> list[dict[str, Any]]:
    """Lay out the results from ``first`` to before ``last``."""
    columns = [
        _column(group.labels, scores[first:last].round(SCORE_DECIMALS).tolist(), best[first:last])
        for group, scores, best in zip(result.groups, result.scores, result.best, strict=True)
    ]
    if not result.grouped:
        return [_item(first + row, *answer) for row, answer in enumerate(columns[0])]
    names = [group.name for group in result.groups]
    return [
        _item(first + row, *(dict(zip(names, parts, strict=True)) for parts in zip(*answers, strict=True)))
        for row, answers in enumerate(zip(*columns, strict=True))
    ]


def summary(classifier: Classifier) -> dict[str, Any]:
    """Lay out what is known of a classifier."""
    used_at = classifier.used_at
    return {
        "classifier_id": classifier.id,
        "user_id": owner_uuid(classifier.owner),
        "model": classifier.model,
        "labels": classifier.labels,
        "access": classifier.access.value,
        "updated_number": classifier.version,
        "used_number": classifier.used_number,
        "created_at": _time(classifier.created_at),
        "updated_at": _time(classifier.updated_at),
        "used_at": None if used_at is None else _time(used_at),
        "is_active": True,
        "is_latest": True,
        "metadata_": {},
    }


def _column(
    labels: tuple[str, ...], scores: list[list[float]], best: list[int]
) -> Iterable[tuple[str, float, list[dict[str, Any]]]]:
    """Give prediction, score and predictions of one group for each text."""
    for row, place in zip(scores, best, strict=True):
        predictions = [{"label": label, "score": score} for label, score in zip(labels, row, strict=True)]
        yield labels[place], row[place], predictions


def _item(index: int, prediction: Any, score: Any, predictions: Any) -> dict[str, Any]:
    return {
        "object": "classification",
        "index": index,
        "prediction": prediction,
        "score": score,
        "predictions": predictions,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")

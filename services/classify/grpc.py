"""The typed gRPC door."""

from __future__ import annotations

from typing import Any

import grpc.aio
from searchfoundation.v1 import classify_pb2, classify_pb2_grpc

from services.classify.few_shot import FewShot
from services.classify.messages import (
    classifications,
    classifier_message,
    classify_fields,
    classify_location,
    train_fields,
    train_location,
    update_fields,
    usage,
)
from services.classify.parsing import ClassifyParser
from services.classify.types import TrainResult, UpdateRequest, ZeroShotRequest
from services.classify.zero_shot import ZeroShot
from services.core.call import Call, current_call
from services.core.serving.messages import fill, timings

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
            model=result.model, usage=usage(result.total_tokens), timings=timings(call.timings)
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
        usage=usage(result.total_tokens),
        timings=timings(call.timings),
    )

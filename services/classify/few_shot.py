"""Few-shot classification: classifiers trained on a caller's examples."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services.classify.learner import LabelWeights, learn
from services.classify.lease import Leases
from services.classify.metrics import CLASSIFIER_HITS, CLASSIFIER_MISSES, LEARN_SECONDS
from services.classify.schema import (
    Classifier,
    ClassifyResult,
    FewShotRequest,
    LabelGroup,
    TrainRequest,
    TrainResult,
    UpdateRequest,
    busy,
    new_id,
    not_found,
    parse_id,
    too_few_labels,
    too_many_classifiers,
    too_many_labels,
)
from services.classify.scores import best, softmax
from services.classify.table import ClassifierTable, Trained
from services.classify.uses import UseCounter
from services.classify.zero_shot import ByteCache
from services.core.call import Call
from services.core.content import Content, Usage
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbeddingModel, Engine, Inputs

Vectors = NDArray[np.float32]

_CACHE_BYTES = 64 << 20
_ENTRY_BYTES = 1000


@dataclass(frozen=True, slots=True)
class ClassifierLimits:
    """What one key may have: ``classifiers`` unless ``of_tier`` knows better, and ``labels`` in each."""

    classifiers: int
    labels: int
    of_tier: Mapping[str, int | None]


class FewShot:
    """Trains classifiers and classifies with them.

    Owners are known by ``Call.key_id``. Every method raises ``ServiceError``: RESOURCE_NOT_FOUND for a
    classifier that is not there or not for this caller, SERVICE_UNAVAILABLE while the database is away, and
    what embedding raises. Learning runs in ``executor``.
    """

    def __init__(
        self, engine: Engine, table: ClassifierTable, executor: Executor, limits: ClassifierLimits
    ) -> None:
        self._engine = engine
        self._table = table
        self._executor = executor
        self._limits = limits
        self._leases = Leases(table)
        self._cache: ByteCache[str, Trained] = ByteCache(_CACHE_BYTES)
        self.uses = UseCounter(table)

    async def classify(self, request: FewShotRequest, call: Call) -> ClassifyResult:
        """Classify all contents of ``request`` by the last version that was stored when the call came.

        Texts longer than the model's context are cut.
        """
        classifier_id = _known_form(request.classifier_id)
        trained = await self._open(classifier_id, call.key_id)
        model = self._model(trained, call)
        vectors, usage = await _embed(model, request.contents, 1, call)
        call.usage_tokens += usage.total
        _must_fit(classifier_id, trained, vectors)
        scores = softmax(trained.head.decide(vectors))
        self.uses.count(classifier_id)
        return ClassifyResult(
            model=model.spec.id,
            groups=(LabelGroup(trained.labels),),
            grouped=False,
            scores=[scores],
            best=[best(scores)],
            usage=usage,
        )

    async def train(self, request: TrainRequest, call: Call) -> TrainResult:
        """Make a classifier; it is stored when this returns.

        Raises also INPUT_INVALID_LABELS, INPUT_LABEL_LIMIT_EXCEEDED and AUTHZ_RESOURCE_LIMIT_EXCEEDED.
        """
        call.model = request.model
        model = self._engine.embedder(request.model)
        labels = self._labels((), request.labels)
        if len(labels) < 2:
            raise too_few_labels()
        limit = self._limits.of_tier.get(call.tier) or self._limits.classifiers
        if (current := await self._table.count(call.key_id)) >= limit:
            raise too_many_classifiers(current, limit)
        vectors, usage = await _embed(model, request.contents, request.iterations, call)
        start = LabelWeights.new(vectors, len(labels))
        head = await self._learn(start, vectors, labels, request.labels, request.iterations)
        now = time.time()
        classifier = Classifier(
            id=new_id(model.spec.id),
            owner=call.key_id,
            model=model.spec.id,
            access=request.access,
            labels=labels,
            version=1,
            used_number=0,
            created_at=now,
            updated_at=now,
            used_at=None,
        )
        if not await self._table.create(classifier, head.matrix(), limit):
            raise too_many_classifiers(limit, limit)
        call.usage_tokens += usage.total
        return TrainResult(classifier.id, len(request.contents), usage)

    async def update(self, request: UpdateRequest, call: Call) -> TrainResult:
        """Train a classifier of the caller's further, as the only call to do so at a time.

        The new version replaces the old one whole, or not at all. Raises also INPUT_LABEL_LIMIT_EXCEEDED and
        CONFLICT_RESOURCE_BUSY.
        """
        classifier_id = _known_form(request.classifier_id)
        async with self._leases.hold(classifier_id, call.key_id) as holder:
            trained = await self._table.trained(classifier_id)
            if trained is None:
                raise not_found(classifier_id)
            model = self._model(trained, call)
            labels = self._labels(trained.labels, request.labels)
            vectors, usage = await _embed(model, request.contents, request.iterations, call)
            _must_fit(classifier_id, trained, vectors)
            start = trained.head.widened(len(labels))
            head = await self._learn(start, vectors, labels, request.labels, request.iterations)
            if not await self._table.replace(classifier_id, holder, trained.version, labels, head.matrix()):
                gone = await self._table.standing(classifier_id) is None
                raise not_found(classifier_id) if gone else busy(classifier_id)
        call.usage_tokens += usage.total
        return TrainResult(classifier_id, len(request.contents), usage)

    async def list(self, call: Call) -> list[Classifier]:
        """Give the caller's classifiers, oldest first."""
        await self.uses.flush()
        return await self._table.list(call.key_id)

    async def get(self, classifier_id: str, call: Call) -> Classifier:
        """Describe a classifier that the caller may classify with."""
        await self.uses.flush()
        found = await self._table.find(_known_form(classifier_id))
        if found is None or not found.open_to(call.key_id):
            raise not_found(classifier_id)
        return found

    async def delete(self, classifier_id: str, call: Call) -> str:
        """Delete a classifier of the caller's; returns its id."""
        found = _known_form(classifier_id)
        if not await self._table.delete(found, call.key_id):
            raise not_found(classifier_id)
        self._cache.drop(found)
        return found

    async def _open(self, classifier_id: str, caller: str) -> Trained:
        """Give the last version of a classifier that ``caller`` may use."""
        standing = await self._table.standing(classifier_id)
        if standing is None or not standing.open_to(caller):
            raise not_found(classifier_id)
        cached = self._cache.get(classifier_id)
        if cached is not None and cached.version == standing.version:
            CLASSIFIER_HITS.inc()
            return cached
        CLASSIFIER_MISSES.inc()
        trained = await self._table.trained(classifier_id)
        if trained is None:
            raise not_found(classifier_id)
        self._cache.put(classifier_id, trained, _ENTRY_BYTES + trained.head.weights.nbytes)
        return trained

    def _model(self, trained: Trained, call: Call) -> EmbeddingModel:
        """Give the model of a classifier; raises INPUT_MODEL_NOT_FOUND when it is not served here."""
        call.model = trained.model
        return self._engine.embedder(trained.model)

    def _labels(self, known: tuple[str, ...], given: Sequence[str]) -> tuple[str, ...]:
        """Return the labels known and those that are new, in the order in which they came."""
        labels = tuple(dict.fromkeys((*known, *given)))
        if len(labels) > self._limits.labels:
            raise too_many_labels(len(labels), self._limits.labels)
        return labels

    async def _learn(
        self,
        start: LabelWeights,
        vectors: Vectors,
        labels: tuple[str, ...],
        given: Sequence[str],
        iterations: int,
    ) -> LabelWeights:
        places = {label: place for place, label in enumerate(labels)}
        targets = np.array([places[label] for label in given], np.intp)
        stop = threading.Event()
        work = partial(_timed, partial(learn, start, vectors, targets, iterations, stop))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            stop.set()


async def _embed(
    model: EmbeddingModel, contents: Sequence[Content], times: int, call: Call
) -> tuple[Vectors, Usage]:
    """Return unit vectors (contents, width) and what is billed, ``times`` the tokens of the contents."""
    copies = None if times == 1 else [times] * len(contents)
    found = await model.vectors([Inputs(contents, model.spec.classify_task, copies=copies)], True, call)
    return found.vectors, found.usage


def _timed(work: partial[LabelWeights]) -> LabelWeights:
    with LEARN_SECONDS.time():
        return work()


def _known_form(classifier_id: str) -> str:
    """Return the id as it is stored; what has no such form is simply not there."""
    found = parse_id(classifier_id)
    if found is None:
        raise not_found(classifier_id)
    return found


def _must_fit(classifier_id: str, trained: Trained, vectors: Vectors) -> None:
    """Refuse vectors of another width than those learned from: the name now stands for another model."""
    if trained.head.width != vectors.shape[1]:
        raise ServiceError(
            ErrorCode.INPUT_INVALID,
            reason=f"Classifier '{classifier_id}' was trained with another model that was then called "
            f"'{trained.model}'. Delete it and train a new one.",
        )

"""Zero-shot classification: how near the vector of a text lies to that of each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from services.classify.cache import ByteCache
from services.classify.metrics import LABEL_BYTES, LABEL_HITS, LABEL_MISSES
from services.classify.products import similarities
from services.classify.scores import best, softmax
from services.classify.types import ClassifyResult, LabelGroup, ZeroShotRequest
from services.core.call import Call
from services.core.inference import EmbeddingModel, Engine, finish, require_finite
from services.core.inference.embedding import Texts

Vectors = NDArray[np.float32]

_ENTRY_BYTES = 400
"""What a label costs beside its vector and its own characters."""


@dataclass(frozen=True, slots=True)
class LabelVector:
    """The unit vector (width,) of a label and the tokens it is billed with."""

    vector: Vectors
    tokens: int


class ZeroShot:
    """Classifies with the models of one engine, remembering label vectors between calls.

    Products too large for the event loop run in ``executor``.
    """

    def __init__(self, engine: Engine, executor: Executor, cache_bytes: int) -> None:
        self._engine = engine
        self._executor = executor
        self._cache: ByteCache[tuple[str, str | None, str], LabelVector] = ByteCache(cache_bytes)

    async def classify(self, request: ZeroShotRequest, call: Call) -> ClassifyResult:
        """Classify all texts of ``request``, on behalf of ``call``, whose model and tokens are filled in.

        Each text and each label is embedded once, labels that are remembered not at all; all of them are
        billed. Texts and labels longer than the model's context are cut. Raises ``ServiceError``: the key's
        limits, a full queue, an expired call.
        """
        call.model = request.model
        model = self._engine.embedder(request.model)
        labels = [label for group in request.groups for label in group.labels]
        known = self._remembered(model, labels)
        texts, made, billed = await _embed(model, request.texts, labels, known, call)
        call.usage_tokens += billed
        self._remember(model, made)
        known.update(made)
        targets = np.stack([known[label].vector for label in labels])
        cosines = await similarities(texts, targets, self._executor)
        scores = [softmax(part) for part in _split(cosines, request.groups)]
        return ClassifyResult(
            model=request.model,
            groups=request.groups,
            grouped=request.grouped,
            scores=scores,
            best=[best(part) for part in scores],
            total_tokens=billed,
        )

    def _remembered(self, model: EmbeddingModel, labels: Sequence[str]) -> dict[str, LabelVector]:
        spec = model.spec
        found: dict[str, LabelVector] = {}
        hits = 0
        for label in labels:
            entry = self._cache.get((spec.weights_id, spec.classify_task, label))
            if entry is not None:
                found[label] = entry
                hits += 1
        LABEL_HITS.labels(spec.id).inc(hits)
        LABEL_MISSES.labels(spec.id).inc(len(labels) - hits)
        return found

    def _remember(self, model: EmbeddingModel, made: Mapping[str, LabelVector]) -> None:
        spec = model.spec
        for label, entry in made.items():
            size = _ENTRY_BYTES + 4 * len(label) + entry.vector.nbytes
            self._cache.put((spec.weights_id, spec.classify_task, label), entry, size)
        LABEL_BYTES.set(self._cache.size)


async def _embed(
    model: EmbeddingModel,
    texts: Sequence[str],
    labels: Sequence[str],
    known: Mapping[str, LabelVector],
    call: Call,
) -> tuple[Vectors, dict[str, LabelVector], int]:
    """Embed texts and the labels not known in one job, and charge for all of them at once.

    Returns the unit vectors of the texts, the new labels, and the tokens billed.
    """
    task = model.spec.classify_task
    copies: dict[str, int] = {}
    known_tokens = 0
    for label in labels:
        if (entry := known.get(label)) is not None:
            known_tokens += entry.tokens
        else:
            copies[label] = copies.get(label, 0) + 1

    async def charge(tokens: int) -> None:
        await call.charge(tokens + known_tokens)

    groups = [Texts(texts, task)]
    if copies:
        groups.append(Texts(list(copies), task, copies=list(copies.values())))
    encoded = await model.encode(groups, True, replace(call, charge=charge))
    vectors = finish(np.stack(cast("list[Vectors]", encoded.results)))
    require_finite(vectors, model.spec.id)
    first = len(texts)
    made = {
        # Copied: a view would keep the vectors of the whole call in memory.
        label: LabelVector(vectors[place].copy(), encoded.token_counts[place])
        for place, label in enumerate(copies, first)
    }
    return vectors[:first], made, encoded.billed + known_tokens


def _split(cosines: Vectors, groups: Sequence[LabelGroup]) -> list[Vectors]:
    ends = np.cumsum([len(group.labels) for group in groups])
    return np.split(cosines, ends[:-1], axis=1)

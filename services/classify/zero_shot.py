"""Zero-shot classification: how near the vector of a text lies to that of each label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.classify.label_memory import LabelMatrix, LabelMemory, LabelVector
from services.classify.products import similarities
from services.classify.scores import best, softmax
from services.classify.types import ClassifyResult, LabelGroup, ZeroShotRequest
from services.core.call import Call
from services.core.content import Content
from services.core.inference import EmbeddingModel, Engine, Inputs

Vectors = NDArray[np.float32]


class ZeroShot:
    """Classifies with the models of one engine, remembering label vectors between calls.

    Products too large for the event loop run in ``executor``.
    """

    def __init__(self, engine: Engine, executor: Executor, memory_bytes: int) -> None:
        self._engine = engine
        self._executor = executor
        self._memory = LabelMemory(memory_bytes)

    async def classify(self, request: ZeroShotRequest, call: Call) -> ClassifyResult:
        """Classify all contents of ``request``, on behalf of ``call``, whose model and tokens are filled in.

        Each content and each label is embedded once, labels that are remembered not at all; all of them are
        billed. Texts and labels longer than the model's context are cut. Raises ``ServiceError``: the key's
        limits, a full queue, an expired call.
        """
        call.model = request.model
        model = self._engine.embedder(request.model)
        labels = tuple(label for group in request.groups for label in group.labels)
        texts, targets, billed = await self._vectors(model, request.contents, labels, call)
        call.usage_tokens += billed
        cosines = await similarities(texts, targets.vectors, self._executor)
        scores = [softmax(part) for part in _split(cosines, request.groups)]
        return ClassifyResult(
            model=request.model,
            groups=request.groups,
            grouped=request.grouped,
            scores=scores,
            best=[best(part) for part in scores],
            total_tokens=billed,
        )

    async def _vectors(
        self, model: EmbeddingModel, contents: Sequence[Content], labels: tuple[str, ...], call: Call
    ) -> tuple[Vectors, LabelMatrix, int]:
        """Return the vectors of contents and labels, and the tokens billed for all of them."""
        matrix = self._memory.matrix(model.spec, labels)
        if matrix is not None:
            vectors, _, billed = await _embed(model, contents, {}, matrix.tokens, call)
            return vectors, matrix, billed
        known = self._memory.known(model.spec, labels)
        missing = Counter(label for label in labels if label not in known)
        known_tokens = sum(known[label].tokens for label in labels if label in known)
        vectors, made, billed = await _embed(model, contents, missing, known_tokens, call)
        return vectors, self._memory.remember(model.spec, labels, known, made), billed


async def _embed(
    model: EmbeddingModel,
    contents: Sequence[Content],
    labels: Mapping[str, int],
    known_tokens: int,
    call: Call,
) -> tuple[Vectors, dict[str, LabelVector], int]:
    """Embed contents and new ``labels``, which come so many times each, in one job.

    One charge is made for all of them and for the ``known_tokens`` of other labels. Returns the unit vectors
    of the contents, the labels, and the tokens billed.
    """
    task = model.spec.classify_task

    async def charge(tokens: int) -> None:
        await call.charge(tokens + known_tokens)

    groups = [Inputs(contents, task)]
    if labels:
        groups.append(Inputs(list(labels), task, copies=list(labels.values()), name="label"))
    found = await model.vectors(groups, True, replace(call, charge=charge))
    vectors = found.vectors
    first = len(contents)
    made = {
        # Copied: a view would keep the vectors of the whole call in memory.
        label: LabelVector(vectors[place].copy(), found.token_counts[place])
        for place, label in enumerate(labels, first)
    }
    return vectors[:first], made, found.usage.total + known_tokens


def _split(cosines: Vectors, groups: Sequence[LabelGroup]) -> list[Vectors]:
    if len(groups) == 1:
        return [cosines]
    ends = np.cumsum([len(group.labels) for group in groups])
    return np.split(cosines, ends[:-1], axis=1)

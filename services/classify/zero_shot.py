"""Zero-shot classification: by the nearness of texts and labels, whose vectors are kept."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.classify.metrics import LABEL_BYTES, LABEL_HITS, LABEL_MISSES
from services.classify.schema import ClassifyResult, LabelGroup, ZeroShotRequest
from services.classify.scores import best, similarities, softmax
from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.content import Content, Usage
from services.core.inference import EmbeddingModel, Engine, Inputs

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Values of known sizes; the least recently used make room. For one event loop."""

    def __init__(self, capacity: int) -> None:
        """Hold up to ``capacity`` bytes."""
        self._capacity = capacity
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.size = 0
        """Bytes held."""

    def get(self, key: K) -> V | None:
        """Return a value and keep it longer; None when it is not there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value of ``size`` bytes, unless it alone is too large."""
        self.drop(key)
        if size > self._capacity:
            return
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self._capacity:
            _, (_, freed) = self._entries.popitem(last=False)
            self.size -= freed

    def drop(self, key: K) -> None:
        """Forget a value."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry[1]

    def __len__(self) -> int:
        return len(self._entries)


Vectors = NDArray[np.float32]

_ENTRY_BYTES = 400
"""What an entry costs beside its vectors and characters."""


@dataclass(frozen=True, slots=True)
class LabelVector:
    """The unit vector (width,) of a label and the tokens it is billed with."""

    vector: Vectors
    tokens: int


@dataclass(frozen=True, slots=True)
class LabelMatrix:
    """The unit vectors (labels, width) of all labels of a call, and the tokens of all of them."""

    vectors: Vectors
    tokens: int


class LabelMemory:
    """Remembers labels one by one, and the lists of them as they were asked for, in so many bytes."""

    def __init__(self, capacity: int) -> None:
        self._cache: ByteCache[tuple[str, str | None, str | tuple[str, ...]], LabelVector | LabelMatrix]
        self._cache = ByteCache(capacity)

    def matrix(self, spec: ModelSpec, labels: tuple[str, ...]) -> LabelMatrix | None:
        """Return what is known of a whole list; calls tend to come with the same one again."""
        found = self._cache.get((spec.weights_id, spec.classify_task, labels))
        if isinstance(found, LabelMatrix):
            LABEL_HITS.labels(spec.id).inc(len(labels))
            return found
        return None

    def known(self, spec: ModelSpec, labels: Sequence[str]) -> dict[str, LabelVector]:
        """Return those of the labels that are known."""
        found: dict[str, LabelVector] = {}
        misses = 0
        for label in labels:
            entry = self._cache.get((spec.weights_id, spec.classify_task, label))
            if isinstance(entry, LabelVector):
                found[label] = entry
            else:
                misses += 1
        LABEL_HITS.labels(spec.id).inc(len(labels) - misses)
        LABEL_MISSES.labels(spec.id).inc(misses)
        return found

    def remember(
        self,
        spec: ModelSpec,
        labels: tuple[str, ...],
        known: Mapping[str, LabelVector],
        made: Mapping[str, LabelVector],
    ) -> LabelMatrix:
        """Keep what was ``made`` for a list, and the list; ``known`` is the rest of it."""
        for label, entry in made.items():
            size = _ENTRY_BYTES + 4 * len(label) + entry.vector.nbytes
            self._cache.put((spec.weights_id, spec.classify_task, label), entry, size)
        each = [known.get(label) or made[label] for label in labels]
        matrix = LabelMatrix(np.stack([e.vector for e in each]), sum(e.tokens for e in each))
        size = _ENTRY_BYTES + sum(50 + 4 * len(label) for label in labels) + matrix.vectors.nbytes
        self._cache.put((spec.weights_id, spec.classify_task, labels), matrix, size)
        LABEL_BYTES.set(self._cache.size)
        return matrix


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
        call.usage_tokens += billed.total
        cosines = await similarities(texts, targets.vectors, self._executor)
        scores = [softmax(part) for part in _split(cosines, request.groups)]
        return ClassifyResult(
            model=request.model,
            groups=request.groups,
            grouped=request.grouped,
            scores=scores,
            best=[best(part) for part in scores],
            usage=billed,
        )

    async def _vectors(
        self, model: EmbeddingModel, contents: Sequence[Content], labels: tuple[str, ...], call: Call
    ) -> tuple[Vectors, LabelMatrix, Usage]:
        """Return the vectors of contents and labels, and what is billed for all of them."""
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
) -> tuple[Vectors, dict[str, LabelVector], Usage]:
    """Embed contents and new ``labels``, which come so many times each, in one job.

    One charge is made for all of them and for the ``known_tokens`` of other labels. Returns the unit vectors
    of the contents, the labels, and what is billed.
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
    return vectors[:first], made, found.usage._replace(text=found.usage.text + known_tokens)


def _split(cosines: Vectors, groups: Sequence[LabelGroup]) -> list[Vectors]:
    if len(groups) == 1:
        return [cosines]
    ends = np.cumsum([len(group.labels) for group in groups])
    return np.split(cosines, ends[:-1], axis=1)

"""The vectors of labels, kept between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.classify.cache import ByteCache
from services.classify.metrics import LABEL_BYTES, LABEL_HITS, LABEL_MISSES
from services.core.catalog.types import ModelSpec

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

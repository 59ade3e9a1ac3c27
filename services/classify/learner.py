"""The learner of few-shot classifiers: online passive-aggressive, linear, on frozen unit vectors.

For one example x of label t with decision values s, each other label r that comes closer than a margin of 1
violates it by v_r = 1 - s_t + s_r. The passive-aggressive step (PA-I of Crammer et al., "Online
Passive-Aggressive Algorithms", 2006) is the smallest change of the weights that satisfies the constraint,
cut at ``AGGRESSIVENESS``; here the constraint is the mean of the violated ones, weighted by their
violations, so that all rivals learn from an example and not only the nearest. The answer is the mean of the
weights after each step, as in averaged perceptrons: it depends less on the examples that came last.

The vectors of one encoder lie in a cone, so each of them has much of the cone's axis in it. A classifier
therefore looks at them from the middle of its first examples. That does what a bias would do, and unlike a
bias it does not let examples of one label alone, as a later training may bring, outweigh all others.

Weights are written as sums of examples while learning, so that one step costs a product with a row of the
examples' Gram matrix, whatever the width of the vectors.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from services.classify.scores import product

Vectors = NDArray[np.float32]
Sums = NDArray[np.float64]

AGGRESSIVENESS = 0.3
_SEED = 0
_TINY = 1e-6


class LearningStoppedError(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True, slots=True)
class LabelWeights:
    """What was learned: ``weights`` (labels, width), and the ``centre`` (width,) vectors are seen from."""

    centre: Vectors
    weights: Vectors

    @classmethod
    def new(cls, vectors: Vectors, labels: int) -> Self:
        """Know nothing yet, and look from the middle of ``vectors`` (n, width)."""
        return cls(vectors.mean(axis=0), np.zeros((labels, vectors.shape[1]), np.float32))

    @classmethod
    def from_matrix(cls, matrix: Vectors) -> Self:
        """Read what ``matrix`` wrote."""
        return cls(matrix[0], matrix[1:])

    def matrix(self) -> Vectors:
        """Write all of it as one matrix (1 + labels, width)."""
        return np.vstack([self.centre, self.weights])

    @property
    def width(self) -> int:
        """Of the vectors it knows."""
        return len(self.centre)

    def widened(self, labels: int) -> LabelWeights:
        """Know nothing of further labels, ``labels`` in all."""
        return LabelWeights(self.centre, np.pad(self.weights, ((0, labels - len(self.weights)), (0, 0))))

    def seen(self, vectors: Vectors) -> Vectors:
        """Return the directions (n, width) in which unit vectors lie from the centre."""
        seen = vectors - self.centre
        lengths = np.sqrt(np.einsum("nd,nd->n", seen, seen))
        return seen / np.maximum(lengths, _TINY)[:, np.newaxis]

    def decide(self, vectors: Vectors) -> Vectors:
        """Return the decision values (n, labels) of unit vectors (n, width)."""
        return np.einsum("nd,ld->nl", self.seen(vectors), self.weights)


def learn(
    head: LabelWeights,
    vectors: Vectors,
    targets: NDArray[np.intp],
    iterations: int,
    stop: threading.Event | None = None,
) -> LabelWeights:
    """Go ``iterations`` times through the examples, each time in another order that is always the same.

    ``vectors`` (n, width) have unit length; ``targets`` (n,) are their labels. Raises LearningStoppedError
    soon after ``stop`` is set.
    """
    examples = head.seen(vectors)
    gram = product(examples, examples).astype(np.float64)
    values = product(examples, head.weights).astype(np.float64)
    alpha, delay = _passes(gram, values, targets.tolist(), iterations, stop)
    # The mean over all steps of sums that grew step by step: each change counts from when it was made.
    mean = alpha - delay / (iterations * len(examples))
    added = product(np.ascontiguousarray(mean.T, np.float32), np.ascontiguousarray(examples.T))
    return LabelWeights(head.centre, head.weights + added)


def _passes(
    gram: Sums, values: Sums, targets: list[int], iterations: int, stop: threading.Event | None
) -> tuple[Sums, Sums]:
    """Return how often each example was added to each label's weights (labels in columns), and the same
    times the number of steps that had gone before."""
    alpha = np.zeros_like(values)
    delay = np.zeros_like(values)
    # Lists of the rows: taking one out of a matrix costs as much as computing with it.
    examples = list(zip(gram, values, alpha, delay, targets, gram.diagonal().tolist(), strict=True))
    chance = np.random.default_rng(_SEED)
    done = 0
    for _ in range(iterations):
        if stop is not None and stop.is_set():
            raise LearningStoppedError
        changed = False
        for place in chance.permutation(len(examples)).tolist():
            products, value, own, late, target, norm = examples[place]
            violation = products @ alpha
            violation += value
            violation += 1.0 - violation[target]
            violation[target] = 0.0
            np.maximum(violation, 0.0, out=violation)
            total = float(violation.sum())
            if total > 0.0:
                changed = True
                size = _step_size(total, float(violation @ violation), norm)
                violation *= -size / total
                violation[target] = size
                own += violation
                violation *= done
                late += violation
            done += 1
        if not changed:  # nor will it in later passes
            break
    return alpha, delay


def _step_size(total: float, squares: float, norm: float) -> float:
    """Return how much of an example of squared length ``norm`` its label gets, and its rivals lose in all.

    ``total`` and ``squares`` are the sums of the violations and of their squares. Weighted by themselves, the
    violations make one of ``squares / total``; the shares of the rivals have the squared length
    ``squares / total ** 2``.
    """
    loss = squares / total
    return min(AGGRESSIVENESS, loss / max(norm * (1.0 + loss / total), _TINY))

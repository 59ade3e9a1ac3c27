"""The learner of few-shot classifiers: online passive-aggressive, linear, on frozen unit vectors.

For one example x of label t with decision values s, each other label r that comes closer than a margin of 1
violates it by v_r = 1 - s_t + s_r. The passive-aggressive step (PA-I of Crammer et al., "Online
Passive-Aggressive Algorithms", 2006) is the smallest change of the weights that satisfies the constraint,
cut at ``AGGRESSIVENESS``; here the constraint is the mean of the violated ones, weighted by their
violations, so that all rivals learn from an example and not only the nearest. The answer is the mean of the
weights after each step, as in averaged perceptrons: it depends less on the examples that came last.

Weights are written as sums of examples while learning, so that one step costs a product with a row of the
examples' Gram matrix, whatever the width of the vectors.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

AGGRESSIVENESS = 1.0
BIAS = 2.0
"""What the vectors are extended by. Larger than their length of 1: a longer x makes smaller steps, and the
vectors of one encoder lie in a cone, whose axis says nothing."""

_SEED = 0


class LearningStoppedError(Exception):
    """Nobody waits for the result any more."""


def learn(
    vectors: Vectors,
    targets: NDArray[np.intp],
    start: Vectors,
    iterations: int,
    stop: threading.Event | None = None,
) -> Vectors:
    """Go ``iterations`` times through the examples, each time in another order that is always the same.

    ``vectors`` (n, width) have unit length; ``targets`` (n,) are rows of ``start`` (labels, width + 1), the
    weights to begin with, of which the last column is the bias. Returns weights of that shape. Raises
    LearningStoppedError soon after ``stop`` is set.
    """
    examples = _extended(vectors)
    gram = examples @ examples.T
    values = examples @ start.T
    alpha, delay, steps = _passes(gram, values, targets, iterations, stop)
    # The mean over all steps of sums that grew step by step: each change counts from when it was made.
    mean = alpha - delay / steps
    return (start + mean.T @ examples).astype(np.float32)


def decide(weights: Vectors, vectors: Vectors) -> Vectors:
    """Return the decision values (n, labels) of unit vectors (n, width)."""
    values: Vectors = np.einsum("nd,ld->nl", vectors, weights[:, :-1])
    values += BIAS * weights[:, -1]
    return values


def _extended(vectors: Vectors) -> Vectors:
    return np.hstack([vectors, np.full((len(vectors), 1), BIAS, np.float32)])


def _passes(
    gram: Vectors, values: Vectors, targets: NDArray[np.intp], iterations: int, stop: threading.Event | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return what each example added to each label's weights (n, labels), the same times the number of
    steps that had gone before, and the number of steps."""
    count, labels = values.shape
    alpha = np.zeros((count, labels))
    delay = np.zeros((count, labels))
    gram64, values64 = gram.astype(np.float64), values.astype(np.float64)
    norms = gram64.diagonal().tolist()
    places = targets.tolist()
    chance = np.random.default_rng(_SEED)
    done = 0
    for _ in range(iterations):
        if stop is not None and stop.is_set():
            raise LearningStoppedError
        changed = False
        for example in chance.permutation(count).tolist():
            target = places[example]
            violation = gram64[example] @ alpha
            violation += values64[example]
            violation += 1.0 - violation[target]
            violation[target] = 0.0
            np.maximum(violation, 0.0, out=violation)
            total = violation.sum()
            if total > 0.0:
                changed = True
                change = _step(violation, total, norms[example], target)
                alpha[example] += change
                delay[example] += done * change
            done += 1
        if not changed:
            # Nor will it in later passes; they only count for the mean.
            done = iterations * count
            break
    return alpha, delay, done


def _step(violation: NDArray[np.float64], total: float, norm: float, target: int) -> NDArray[np.float64]:
    """Return the change of each label's weights, as a multiple of the example of squared length ``norm``."""
    shares = violation / total
    loss = violation @ shares
    size = min(AGGRESSIVENESS, loss / (norm * (1.0 + shares @ shares)))
    shares *= -size
    shares[target] = size
    return shares

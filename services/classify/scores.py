"""From similarities and decision values to scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def softmax(values: NDArray[np.float32]) -> Scores:
    """Turn each row of (texts, labels) into scores that sum to 1, at temperature 1."""
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def best(scores: Scores) -> list[int]:
    """Return the place of each row's highest score, the first of equal ones."""
    return scores.argmax(axis=1).tolist()

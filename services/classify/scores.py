"""From vectors to similarities, and from those to scores."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

_PART = 1 << 18
_ROWS = 16
_INLINE = 2_000_000
"""Multiplications that take the event loop less than a tenth of a millisecond."""


def product(left: Vectors, right: Vectors) -> Vectors:
    """Return the inner products (n, m) of rows of (n, width) and (m, width)."""
    count, width = right.shape
    columns = max(1, _PART // (_ROWS * width))
    result = np.empty((len(left), count), np.float32)
    for column in range(0, count, columns):
        part = right[column : column + columns].T
        for row in range(0, len(left), _ROWS):
            np.matmul(left[row : row + _ROWS], part, out=result[row : row + _ROWS, column : column + columns])
    return result


async def similarities(left: Vectors, right: Vectors, executor: Executor) -> Vectors:
    """Return ``product``, made in ``executor`` if it takes long."""
    if len(left) * len(right) * left.shape[1] <= _INLINE:
        return product(left, right)
    return await asyncio.get_running_loop().run_in_executor(executor, product, left, right)


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

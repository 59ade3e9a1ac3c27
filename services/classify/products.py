"""Products of vectors in one thread, on the event loop where they are small and beside it where they are not.

A large matrix product of numpy's wakes up a pool of BLAS threads, which then spin for a while on the cores
that the engine's workers need. Parts below ``_PART`` stay in the calling thread, and cost hardly more.
"""

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

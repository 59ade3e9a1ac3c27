"""Products of vectors, on the event loop where they are small and beside it where they are not."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

_INLINE = 2_000_000
"""Multiplications that take the event loop less than half a millisecond."""


async def similarities(left: Vectors, right: Vectors, executor: Executor) -> Vectors:
    """Return the inner products (n, m) of rows of (n, width) and (m, width)."""
    if len(left) * len(right) * left.shape[1] <= _INLINE:
        # einsum stays in this thread; a matrix product may wake up a pool of threads that the workers need.
        return np.einsum("nd,md->nm", left, right)
    return await asyncio.get_running_loop().run_in_executor(executor, _product, left, right)


def _product(left: Vectors, right: Vectors) -> Vectors:
    return left @ right.T

"""Finishing sparse vectors."""

from __future__ import annotations

import numpy as np

from services.core.modeling.types import SparseVector


def prune(vector: SparseVector, *, top_k: int | None = None, threshold: float = 0.0) -> SparseVector:
    """Keep the ``top_k`` largest weights (None: all) of those above ``threshold``; the largest come first.

    Equal weights keep the order of their indices.
    """
    order = np.argsort(-vector.values, kind="stable")[:top_k]
    order = order[vector.values[order] > threshold]
    return SparseVector(vector.indices[order], vector.values[order])

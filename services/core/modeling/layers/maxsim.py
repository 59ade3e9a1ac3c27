"""Late interaction: how well the best token of a document answers each token of a query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK_TOKENS = 4096
"""Document tokens compared at a time: the products of one block are all that is ever held."""


def maxsim(query: NDArray[np.float32], documents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Sum over the query's vectors of the largest product with a vector of the document.

    ``query`` is (vectors, width), each of ``documents`` (vectors, width) with at least one; returns
    (documents,) fp32. Of unit vectors the products are cosines.
    """
    asked = torch.from_numpy(query)
    scores = np.empty(len(documents), np.float32)
    for start, block in _blocks(documents):
        joined = torch.from_numpy(np.concatenate(block) if len(block) > 1 else block[0])
        products = (asked @ joined.T).numpy()
        firsts = np.cumsum([0, *(len(each) for each in block[:-1])])
        best = np.maximum.reduceat(products, firsts, axis=1)
        scores[start : start + len(block)] = best.sum(0)
    return scores


def _blocks(documents: Sequence[NDArray[np.float32]]) -> list[tuple[int, list[NDArray[np.float32]]]]:
    blocks: list[tuple[int, list[NDArray[np.float32]]]] = []
    room = 0
    for i, document in enumerate(documents):
        if not blocks or len(document) > room:
            blocks.append((i, []))
            room = _BLOCK_TOKENS
        blocks[-1][1].append(document)
        room -= len(document)
    return blocks

"""Late chunking: texts read as one by the network, and one vector for each from its part of the whole.

Source: Günther et al., arXiv 2409.04701.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.core.errors import ErrorCode, ServiceError
from services.core.modeling.types import Tokens


@dataclass(frozen=True, slots=True)
class Chunks:
    """``ids`` (tokens,) of all texts; ``spans`` are the half-open ranges of them that belong to each text."""

    ids: NDArray[np.int32]
    spans: tuple[tuple[int, int], ...]
    truncated: bool


def join_chunks(
    tokens: Sequence[Tokens], prefix: int, suffix: int, limit: int, texts: int | None = None
) -> Chunks:
    """Join texts behind one another inside one pair of special tokens, cut to ``limit`` tokens.

    Each of ``tokens`` has ``prefix`` specials before its text and ``suffix`` behind it. The first text owns
    the specials before it, and a prompt that it was tokenised with; the last owns those behind it, unless
    something was cut. There may be more ``texts``, which were not tokenised since these fill the limit.
    Raises ServiceError INPUT_INVALID for a text of which no token is left: there is nothing to average.
    """
    bare = [each.ids[prefix : len(each.ids) - suffix] for each in tokens]
    ends = prefix + np.cumsum([len(part) for part in bare])
    room = limit - suffix
    truncated = bool(ends[-1] > room) or any(each.truncated for each in tokens)
    starts = np.minimum([prefix, *ends[:-1]], room)
    ends = np.minimum(ends, room)
    for place in (*np.flatnonzero(starts == ends), *range(len(tokens), texts or 0)):
        raise ServiceError(ErrorCode.INPUT_INVALID, reason=_nothing_left(int(place), truncated, limit))
    starts[0] = 0
    if not truncated:
        ends[-1] += suffix
    first = tokens[0].ids
    joined = np.concatenate([first[:prefix], *bare])[:room]
    ids = np.concatenate([joined, first[len(first) - suffix :]])
    return Chunks(ids, tuple(zip(starts.tolist(), ends.tolist(), strict=True)), truncated)


def _nothing_left(place: int, truncated: bool, limit: int) -> str:
    if truncated:
        return (
            f"With late chunking all inputs share the model's {limit} tokens, and none are left for input "
            f"{place}. Send fewer or shorter inputs."
        )
    return f"Input {place} has no tokens, and late chunking has nothing to average for it."

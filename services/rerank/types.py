"""Request and result of a ranking, free of any wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.core.content import Content, Usage

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no numpy
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """What to rank and how; already checked against what ``model`` offers.

    ``top_n`` None asks for all results. ``max_document_length`` is in tokens, None for the model's own.
    """

    model: str
    query: Content
    documents: Sequence[Content]
    top_n: int | None = None
    return_documents: bool = True
    truncate: bool = True
    max_document_length: int | None = None
    return_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class RerankResult:
    """The ranking: ``indices`` into the documents and their ``scores``, the best first, equal ones by index.

    Scores are rounded to 8 decimals. ``embeddings`` (results, width) float32 has the rows of the ranking,
    None unless asked for. ``usage`` is what was billed.
    """

    model: str
    indices: list[int]
    scores: list[float]
    embeddings: NDArray[np.float32] | None
    usage: Usage

"""Scoring documents by a query: one interface over the kinds of scorer, and the kind by vectors.

Every kind is a client of the engine's queue: the work of one request is one job, which the scheduler mixes
with that of others. The other kinds are in ``late_interaction``, ``list_scoring`` and ``pair_scoring``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.content import Content, Usage
from services.core.inference.embedding import EmbeddingModel, Vectors
from services.core.inference.submission import Inputs

_QUERY_TASK = "retrieval.query"
_DOCUMENT_TASK = "retrieval.passage"


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """``truncate`` cuts texts that are too long instead of failing.

    ``max_document_length`` is the longest document in tokens, None the model's own. ``return_embeddings``
    asks for a vector per document, of models that make one.
    """

    truncate: bool = True
    max_document_length: int | None = None
    return_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """``values`` (documents,) float32, in the order of the documents; higher is more relevant.

    ``usage`` is what was billed: query and documents once each, after the cut. ``embeddings`` (documents,
    width) float32 of unit length, None unless asked for.
    """

    values: NDArray[np.float32]
    usage: Usage
    embeddings: Vectors | None = None


class Scorer(Protocol):
    """A model in memory that scores documents, behind the queue it shares with others."""

    @property
    def spec(self) -> ModelSpec:
        """The catalogue's entry."""
        ...

    async def score(
        self, query: Content, documents: Sequence[Content], options: ScoreOptions, call: Call
    ) -> Scores:
        """Score one or more ``documents``.

        Equal documents get equal scores, unless the model reads them together. Raises as
        ``EmbeddingModel.embed`` does.
        """
        ...


class VectorScorer:
    """Scores by the cosine of the vectors of query and document, -1 to 1."""

    def __init__(self, model: EmbeddingModel) -> None:
        self.spec = model.spec
        self._model = model
        self._query_task = _QUERY_TASK if _QUERY_TASK in self.spec.tasks else None
        self._document_task = _DOCUMENT_TASK if _DOCUMENT_TASK in self.spec.tasks else None

    async def score(
        self, query: Content, documents: Sequence[Content], options: ScoreOptions, call: Call
    ) -> Scores:
        """Score ``documents``; each distinct one runs once, in one job with the query."""
        different, places = distinct(documents)
        longest = options.max_document_length or self.spec.max_document_length
        copies = np.bincount(places).tolist()
        embedded = await self._model.vectors(
            [
                Inputs([query], self._query_task, self.spec.max_query_length, name="query"),
                Inputs(different, self._document_task, longest, copies, name="document"),
            ],
            options.truncate,
            call,
        )
        vectors = embedded.vectors
        # einsum stays in this thread; a matrix product may wake up a pool of threads that the workers need.
        cosines = np.einsum("ij,j->i", vectors[1:], vectors[0]).clip(-1.0, 1.0)
        return Scores(
            values=cosines[places],
            usage=embedded.usage,
            embeddings=vectors[1:][places] if options.return_embeddings else None,
        )


def distinct(documents: Sequence[Content]) -> tuple[list[Content], NDArray[np.intp]]:
    """Return the documents without repetitions and, for each document, its place among them."""
    found: dict[Content, int] = {}
    places = [found.setdefault(document, len(found)) for document in documents]
    return list(found), np.array(places, np.intp)

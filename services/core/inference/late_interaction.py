"""Scoring documents by late interaction: each token of the query finds its best token of the document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.catalog.types import InputType
from services.core.content import Content
from services.core.inference.embedding import EmbeddingModel, Vectors, finish, require_finite
from services.core.inference.scoring import ScoreOptions, Scores, distinct
from services.core.inference.submission import Inputs
from services.core.modeling.layers.maxsim import maxsim


class LateInteractionScorer:
    """Scores by the sum over the query's vectors, which is at most their number; 32 for ColBERT."""

    def __init__(self, model: EmbeddingModel) -> None:
        self.spec = model.spec
        self._model = model

    async def score(
        self, query: Content, documents: Sequence[Content], options: ScoreOptions, call: Call
    ) -> Scores:
        """Score ``documents``; each distinct one runs once, in one job with the query."""
        different, places = distinct(documents)
        longest = options.max_document_length or self.spec.max_document_length
        copies = np.bincount(places).tolist()
        asked = self.spec.max_query_length
        encoded = await self._model.encode(
            [
                Inputs([query], limit=asked, role=InputType.QUERY, name="query"),
                Inputs(different, limit=longest, copies=copies, name="document"),
            ],
            options.truncate,
            call,
        )
        vectors = cast("list[Vectors]", encoded.results)
        values = await self._model.threads.run(lambda: _compare(vectors))
        require_finite(values, self.spec.id)
        return Scores(values=values[places], usage=encoded.usage)


def _compare(vectors: list[Vectors]) -> NDArray[np.float32]:
    asked, *documents = map(finish, vectors)
    return maxsim(asked, documents)

"""What reranking is, for every door: score the documents, order them, book the tokens."""

from __future__ import annotations

import numpy as np

from services.core.call import Call
from services.core.inference import Engine, ScoreOptions, require_finite
from services.rerank.types import RerankRequest, RerankResult

_DECIMALS = 8


class Reranker:
    """Ranks with the models of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def rank(self, request: RerankRequest, call: Call) -> RerankResult:
        """Rank the documents of ``request``, on behalf of ``call``, whose model and tokens are filled in.

        Raises ``ServiceError``: a text too long without ``truncate``, an image for a model whose scorer reads
        texts, the key's limits, a full queue, an expired call.
        """
        call.model = request.model
        scorer = self._engine.scorer(request.model)
        options = ScoreOptions(request.truncate, request.max_document_length, request.return_embeddings)
        scores = await scorer.score(request.query, request.documents, options, call)
        call.usage_tokens += scores.usage.total
        require_finite(scores.values, request.model)
        values = scores.values.astype(np.float64).round(_DECIMALS) + 0.0  # -0.0 becomes 0.0
        order = np.argsort(-values, kind="stable")[: request.top_n]
        return RerankResult(
            model=request.model,
            indices=order.tolist(),
            scores=values[order].tolist(),
            embeddings=None if scores.embeddings is None else scores.embeddings[order],
            usage=scores.usage,
        )

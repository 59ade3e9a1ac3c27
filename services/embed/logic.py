"""What embedding is, for every door: run the model, shape the vectors, book the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from services.core.call import Call
from services.core.catalog.types import OutputKind
from services.core.inference import (
    EmbeddingModel,
    EmbedOptions,
    Engine,
    Inputs,
    finish,
    prune,
    require_finite,
)
from services.core.modeling.types import SparseVector
from services.core.settings import Settings
from services.embed.encoding import FloatMatrix
from services.embed.types import (
    EmbedRequest,
    EmbedResult,
    MultiVectorResult,
    Result,
    SparseResult,
    SparseWeights,
)


class Embedder:
    """Embeds with the models of one engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._top_k = settings.sparse_top_k
        self._threshold = settings.sparse_threshold

    async def embed(self, request: EmbedRequest, call: Call) -> Result:
        """Embed all contents of ``request``, on behalf of ``call``, whose model and tokens are filled in.

        Raises ``ServiceError``: a text too long without ``truncate``, the key's limits, a full queue, an
        expired call.
        """
        call.model = request.model
        model = self._engine.embedder(request.model)
        result = await self._result(request, model, call)
        call.usage_tokens += result.usage.total
        return result

    async def _result(self, request: EmbedRequest, model: EmbeddingModel, call: Call) -> Result:
        if OutputKind.DENSE in model.spec.outputs:
            return await self._dense(request, model, call)
        if OutputKind.MULTI_VECTOR in model.spec.outputs:
            return await self._multi_vector(request, model, call)
        return await self._sparse(request, model, call)

    async def _dense(self, request: EmbedRequest, model: EmbeddingModel, call: Call) -> EmbedResult:
        options = EmbedOptions(
            request.task, request.truncate, request.late_chunking, request.dimensions, request.normalized
        )
        found = await model.embed(request.contents, options, call)
        return EmbedResult(request.model, found.vectors, request.encodings, found.usage)

    async def _multi_vector(
        self, request: EmbedRequest, model: EmbeddingModel, call: Call
    ) -> MultiVectorResult:
        inputs = Inputs(request.contents, request.task, role=request.role)
        raw = await model.encode([inputs], request.truncate, call)
        matrices = cast("Sequence[FloatMatrix]", raw.results)
        joined = finish(
            np.concatenate(matrices), dimensions=request.dimensions, normalized=request.normalized
        )
        require_finite(joined, request.model)
        ends = np.cumsum([len(each) for each in matrices])[:-1]
        return MultiVectorResult(request.model, np.split(joined, ends), request.encodings, raw.usage)

    async def _sparse(self, request: EmbedRequest, model: EmbeddingModel, call: Call) -> SparseResult:
        raw = await model.encode([Inputs(request.contents, request.task)], request.truncate, call)
        vectors: list[SparseWeights] = []
        for each in cast("Sequence[SparseVector]", raw.results):
            require_finite(each.values, request.model)
            kept = prune(each, top_k=self._top_k, threshold=self._threshold)
            ids: list[int] = kept.indices.tolist()
            vectors.append(SparseWeights(ids, raw.token_names(ids), kept.values))
        return SparseResult(request.model, vectors, raw.usage)

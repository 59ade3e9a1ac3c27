"""What embedding is, for every door: run the model, shape the vectors, book the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from services.core.call import Call
from services.core.catalog.types import OutputKind
from services.core.inference import (
    EmbeddingModel,
    EmbedOptions,
    Engine,
    Inputs,
    add_up,
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
    Encoding,
    MultiVectorResult,
    Result,
    SparseResult,
    SparseWeights,
)

_IN_THREAD_NUMBERS = 1 << 18
"""Numbers from which on they are scaled off the event loop."""


async def embed_vectors(
    request: EmbedRequest, model: EmbeddingModel, call: Call
) -> EmbedResult | MultiVectorResult:
    """Embed all contents of ``request`` with ``model``, which makes dense vectors or one for each token.

    Books nothing. Raises as ``EmbeddingModel.embed`` does.
    """
    if request.multivector or OutputKind.DENSE not in model.spec.outputs:
        return await _multi_vectors(request, model, call)
    options = EmbedOptions(
        request.task, request.truncate, request.late_chunking, request.dimensions, request.normalized
    )
    found = await model.embed(request.contents, options, call)
    return EmbedResult(
        request.model, found.vectors, request.encodings, found.usage, found.counts, found.usages
    )


def part(
    result: EmbedResult | MultiVectorResult, first: int, last: int, encodings: tuple[Encoding, ...]
) -> EmbedResult | MultiVectorResult:
    """Return the rows of ``result`` from ``first`` to before ``last`` as a result of their own."""
    usages = result.usages[first:last]
    usage = add_up(usages)
    if isinstance(result, EmbedResult):
        return EmbedResult(result.model, result.vectors[first:last], encodings, usage)
    tokens = None if result.tokens is None else result.tokens[first:last]
    return MultiVectorResult(result.model, result.vectors[first:last], encodings, usage, tokens=tokens)


async def _multi_vectors(request: EmbedRequest, model: EmbeddingModel, call: Call) -> MultiVectorResult:
    inputs = Inputs(request.contents, request.task, role=request.role, multivector=request.multivector)
    raw = await model.encode([inputs], request.truncate, call)
    matrices = cast("list[FloatMatrix]", raw.results)

    def finish_each() -> None:
        # One by one, and each in the place of what it is made of: those of pictures are large.
        for i, matrix in enumerate(matrices):
            matrices[i] = finish(matrix, dimensions=request.dimensions, normalized=request.normalized)
            require_finite(matrices[i], request.model)

    if sum(matrix.size for matrix in matrices) < _IN_THREAD_NUMBERS:
        finish_each()
    else:
        await model.threads.run(finish_each)
    tokens = [raw.token_names(ids.tolist()) for ids in raw.token_ids] if request.tokens else None
    return MultiVectorResult(
        request.model, matrices, request.encodings, raw.usage, raw.counts, raw.usages, tokens
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
        if set(model.spec.outputs) == {OutputKind.SPARSE}:
            return await self._sparse(request, model, call)
        return await embed_vectors(request, model, call)

    async def _sparse(self, request: EmbedRequest, model: EmbeddingModel, call: Call) -> SparseResult:
        raw = await model.encode([Inputs(request.contents, request.task)], request.truncate, call)
        vectors: list[SparseWeights] = []
        for each in cast("Sequence[SparseVector]", raw.results):
            require_finite(each.values, request.model)
            kept = prune(each, top_k=self._top_k, threshold=self._threshold)
            ids: list[int] = kept.indices.tolist()
            vectors.append(SparseWeights(ids, raw.token_names(ids), kept.values))
        return SparseResult(request.model, vectors, raw.usage)

"""What embedding is, for every door: run the model, shape the vectors, book the tokens."""

from __future__ import annotations

from services.core.call import Call
from services.core.inference import EmbedOptions, Engine, finish, require_finite
from services.embed.types import EmbedRequest, EmbedResult


class Embedder:
    """Embeds with the models of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedResult:
        """Embed all texts of ``request``, on behalf of ``call``, whose model and tokens are filled in.

        Raises ``ServiceError``: a text too long without ``truncate``, the key's limits, a full queue, an
        expired call.
        """
        call.model = request.model
        model = self._engine.embedder(request.model)
        raw = await model.embed(request.texts, EmbedOptions(request.task, request.truncate), call)
        tokens = sum(raw.token_counts)
        call.usage_tokens += tokens
        vectors = finish(raw.vectors, dimensions=request.dimensions, normalized=request.normalized)
        require_finite(vectors, request.model)
        return EmbedResult(
            model=request.model,
            vectors=vectors,
            encodings=request.encodings,
            total_tokens=tokens,
        )

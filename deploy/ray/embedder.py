"""A model of the catalogue as a Ray Serve application: `encode` for handles, POST of JSON over HTTP.

    serve run embedder:app model=jina-embeddings-v3 replicas=2 gpus=1

Each replica loads the model by the Python door and batches what it is asked at one time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from search_foundation import ModelError, load


@serve.deployment(max_ongoing_requests=32)
class Embedder:
    """One replica: one engine in the process."""

    def __init__(self, model: str) -> None:
        self._model = load(model)

    async def encode(self, texts: list[str], **options: Any) -> list[list[float]]:
        """Vectors of texts; ``options`` are those of ``Model.encode``."""
        vectors = await asyncio.to_thread(self._model.encode, texts, **options)
        return vectors.tolist()

    async def __call__(self, request: Request) -> JSONResponse:
        """``{"input": [...], "task": ...}`` to ``{"embeddings": [...]}``."""
        body = await request.json()
        try:
            return JSONResponse({"embeddings": await self.encode(body.pop("input"), **body)})
        except ModelError as error:
            return JSONResponse({"detail": str(error)}, 422)


def app(arguments: Mapping[str, str]) -> serve.Application:
    """The application of ``serve run embedder:app NAME=VALUE ...``: model, replicas, gpus of one replica."""
    return Embedder.options(
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 0))},
    ).bind(arguments.get("model", "all-MiniLM-L6-v2"))

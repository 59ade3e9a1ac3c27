"""Embeddings and reranking in the document."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.openapi.parts import Chapter, Operation
from services.core.catalog.types import ModelSpec
from services.embed.responses import EmbeddingResponse
from services.embed.schemas import request_schema as embed_schema
from services.rerank.responses import RerankingResponse
from services.rerank.schemas import request_schema as rerank_schema


def embeddings(specs: Sequence[ModelSpec], max_items: int) -> Chapter:
    """``/v1/embeddings`` of these models."""
    operation = Operation(
        path="/v1/embeddings",
        name="create_embeddings",
        tag="Embeddings",
        summary="Embed texts",
        description="Answers one vector per input, in the order of the inputs. All or nothing.",
        title="Embedding Request",
        requests={spec.id: embed_schema(spec, max_items) for spec in specs},
        answer=EmbeddingResponse,
        answered="One vector per input.",
    )
    return Chapter((operation,))


def rerank(specs: Sequence[ModelSpec], max_documents: int) -> Chapter:
    """``/v1/rerank`` of these models."""
    operation = Operation(
        path="/v1/rerank",
        name="rerank",
        tag="Rerank",
        summary="Rank documents",
        description="Orders documents by their relevance to a query. All or nothing.",
        title="Reranking Request",
        requests={spec.id: rerank_schema(spec, max_documents) for spec in specs},
        answer=RerankingResponse,
        answered="The ranking, the most relevant document first.",
    )
    return Chapter((operation,))

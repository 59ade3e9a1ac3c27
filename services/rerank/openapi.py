"""Reranking in the OpenAPI document: our own path, and those in the forms of other vendors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, Field

from services.core.catalog.types import ModelSpec
from services.core.openapi.parts import REF, Bounds, Chapter, Document, Operation
from services.core.openapi.vendors import COHERE, TEI, CohereMeta, Post, listed, vendor_chapter
from services.rerank.schema import RerankingResponse, request_schema
from services.rerank.vendors import cohere, tei

_TAG = "Rerank"
_TEI_RANKING: Document = {
    "description": "Bodies with `documents` get the answer of `/v1/rerank`.",
    "anyOf": [
        listed({"$ref": f"{REF}{tei.TeiRank.__name__}"}),
        {"$ref": f"{REF}{RerankingResponse.__name__}"},
    ],
}


class CohereResult(BaseModel):
    """One document of a ranking."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = Field(None, description="Only where it was asked for.")


class CohereRanking(BaseModel):
    """The ranking, the most relevant document first."""

    id: str
    results: list[CohereResult]
    meta: CohereMeta


def chapters(specs: Sequence[ModelSpec], bounds: Bounds) -> Iterator[Chapter]:
    """``/v1/rerank`` of these models, and the forms of other vendors."""
    operation = Operation(
        path="/v1/rerank",
        name="rerank",
        tag=_TAG,
        summary="Rank documents",
        description="Orders documents by their relevance to a query. All or nothing.",
        title="Reranking Request",
        requests={spec.id: request_schema(spec, bounds.documents) for spec in specs},
        answer=RerankingResponse,
        answered="The ranking, the most relevant document first.",
    )
    yield Chapter({_TAG: "Order documents by their relevance to a query."}, (operation,))
    yield _vendors()


def _vendors() -> Chapter:
    """The paths over rankings."""
    two, one = cohere.CohereRerankBody, cohere.CohereRerankV1Body
    posts = [
        Post(COHERE, "/v2/rerank", "cohere_rerank", "Rank documents", two, CohereRanking),
        Post(COHERE, "/cohere/v1/rerank", "cohere_rerank_v1", "Rank documents (v1)", one, CohereRanking),
        Post(TEI, "/rerank", "tei_rerank", "Rank texts", tei.TeiRerankBody, _TEI_RANKING),
    ]
    return vendor_chapter(posts, (tei.TeiRank,))

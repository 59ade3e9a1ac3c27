"""Paths in the forms of other vendors, in the document: chapters of their own beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from gateway.openapi.parts import (
    JSON,
    LIMIT_HEADERS,
    MODEL_ERRORS,
    SECURITY,
    Chapter,
    Document,
    answer,
    errors,
)
from services.core.catalog.types import ModelSpec, OutputKind
from services.core.requests.fields import Flag
from services.embed.spellings import INPUT_TYPES
from services.rerank.responses import RerankingResponse

COHERE, TEI = "Cohere", "Text Embeddings Inference"

_TEXTS: Document = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_FLAG: Document = TypeAdapter(Flag).json_schema()
_KINDS = ("float", "base64", "binary", "ubinary", "int8", "uint8")


class CohereVersion(BaseModel):
    """Version of Cohere's API."""

    version: str


class CohereUnits(BaseModel):
    """What was billed."""

    input_tokens: int | None = None
    search_units: int | None = None


class CohereMeta(BaseModel):
    """What Cohere's clients keep of an answer."""

    api_version: CohereVersion
    billed_units: CohereUnits


class CohereEmbeddings(BaseModel):
    """Vectors by kind of number; from `/v1/embed` without `embedding_types` a list."""

    id: str
    texts: list[str]
    embeddings: dict[str, list[Any]] | list[list[float]]
    meta: CohereMeta
    response_type: str


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


def vendor_embeddings(specs: Sequence[ModelSpec]) -> Chapter:
    """``/v1/embed``, ``/v2/embed`` and ``/embed`` of these models, and ``/embeddings``."""
    dense = [spec.id for spec in specs if OutputKind.DENSE in spec.outputs]
    if not dense:
        return Chapter(())
    cohere = _body(
        {
            "model": {"type": "string", "enum": dense},
            "texts": _TEXTS,
            "input_type": {"enum": [*INPUT_TYPES, None]},
            "embedding_types": {
                "type": ["array", "null"],
                "items": {"enum": list(_KINDS)},
                "minItems": 1,
            },
            "truncate": {"enum": ["NONE", "END", None]},
        },
        ("model", "texts"),
    )
    tei = _body(
        {
            "inputs": {"anyOf": [{"type": "string"}, _TEXTS]},
            "normalize": _FLAG,
            "truncate": _FLAG,
        },
        ("inputs",),
    )
    vectors: Document = {
        "description": "One vector for each text.",
        "content": {
            JSON: {"schema": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}
        },
    }
    embedded = answer("The vectors.", CohereEmbeddings, LIMIT_HEADERS)
    return Chapter(
        (),
        {
            "/v2/embed": {"post": _operation(COHERE, "Embed texts", "cohere_embed", cohere, embedded)},
            "/v1/embed": {
                "post": _operation(COHERE, "Embed texts (v1)", "cohere_embed_v1", cohere, embedded)
            },
            "/embed": {
                "post": _operation(TEI, "Embed texts by the default model", "tei_embed", tei, vectors)
            },
        },
        (CohereEmbeddings,),
    )


def vendor_rankings(specs: Sequence[ModelSpec]) -> Chapter:
    """``/v2/rerank`` and ``/rerank`` of these models."""
    cohere = _body(
        {
            "model": {"type": "string", "enum": [spec.id for spec in specs]},
            "query": {"type": "string"},
            "documents": _TEXTS,
            "top_n": {"type": ["integer", "null"], "minimum": 1},
        },
        ("model", "query", "documents"),
    )
    tei = _body(
        {"query": {"type": "string"}, "texts": _TEXTS, "truncate": _FLAG, "return_text": _FLAG},
        ("query", "texts"),
    )
    scores: Document = {
        "description": "The ranking, the best first. Bodies with `documents` get that of `/v1/rerank`.",
        "content": {
            JSON: {
                "schema": {
                    "anyOf": [
                        {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "index": {"type": "integer"},
                                    "score": {"type": "number"},
                                    "text": {"type": "string"},
                                },
                                "required": ["index", "score"],
                            },
                        },
                        {"$ref": f"#/components/schemas/{RerankingResponse.__name__}"},
                    ]
                }
            }
        },
    }
    ranked = answer("The ranking.", CohereRanking, LIMIT_HEADERS)
    return Chapter(
        (),
        {
            "/v2/rerank": {"post": _operation(COHERE, "Rank documents", "cohere_rerank", cohere, ranked)},
            "/rerank": {"post": _operation(TEI, "Rank by the default model", "tei_rerank", tei, scores)},
        },
        (CohereRanking,),
    )


def _body(properties: Document, required: Sequence[str]) -> Document:
    return {"type": "object", "properties": properties, "required": list(required)}


def _operation(tag: str, summary: str, name: str, body: Document, answered: Document) -> Document:
    described: Document = {
        "tags": [tag],
        "summary": summary,
        "operationId": name,
        "security": SECURITY,
        "requestBody": {"required": True, "content": {JSON: {"schema": body}}},
        "responses": {"200": answered, **errors(MODEL_ERRORS)},
    }
    if tag == TEI:
        for status, response in described["responses"].items():
            if status != "200":
                response["content"] = {JSON: {"schema": {"type": "object", "required": ["error", "detail"]}}}
    return described

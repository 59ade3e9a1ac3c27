"""Embeddings in the OpenAPI document: our own path, and those in the forms of other vendors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from services.core.catalog.types import Modality, ModelSpec, OutputKind
from services.core.openapi.parts import CALL_ERRORS, REF, Bounds, Chapter, Operation
from services.core.openapi.vendors import (
    COHERE,
    GEMINI,
    NUMBERS,
    OLLAMA,
    TEI,
    VOYAGE,
    CohereMeta,
    Post,
    listed,
    vendor_chapter,
    vendor_operation,
)
from services.embed.schema import EmbeddingResponse, request_schema
from services.embed.vendors import cohere, gemini, ollama, tei, voyage

_TAG = "Embeddings"
_VECTORS = (OutputKind.DENSE, OutputKind.MULTI_VECTOR, OutputKind.SPARSE)


class CohereEmbeddings(BaseModel):
    """Vectors by kind of number; from `/v1/embed` without `embedding_types` a list."""

    id: str
    texts: list[str]
    embeddings: dict[str, list[Any]] | list[list[float]]
    meta: CohereMeta
    response_type: str


def chapters(specs: Sequence[ModelSpec], bounds: Bounds) -> Iterator[Chapter]:
    """``/v1/embeddings`` of these models, and the forms of other vendors."""
    operation = Operation(
        path="/v1/embeddings",
        name="create_embeddings",
        tag=_TAG,
        summary="Embed texts",
        description="Answers one vector per input, in the order of the inputs. All or nothing.",
        title="Embedding Request",
        requests={spec.id: request_schema(spec, bounds.items) for spec in specs},
        answer=EmbeddingResponse,
        answered="One vector per input.",
    )
    yield Chapter({_TAG: "Turn texts into vectors."}, (operation,))
    yield _vendors(specs)


def _vendors(specs: Sequence[ModelSpec]) -> Chapter:
    """The paths over embeddings that some of these models can answer."""
    kinds = [kind for kind in _VECTORS if any(tei.gives(kind)(spec) for spec in specs)]
    posts: list[Post] = []
    if OutputKind.DENSE in kinds:
        posts += _dense()
        if any(Modality.IMAGE in spec.modalities for spec in specs):
            posts.append(
                Post(
                    VOYAGE,
                    "/v1/multimodalembeddings",
                    "voyage_multimodal",
                    "Embed texts and images",
                    voyage.VoyageMultimodalBody,
                    voyage.VoyageEmbeddings,
                )
            )
    if OutputKind.MULTI_VECTOR in kinds:
        matrices = listed(listed(NUMBERS))
        posts.append(
            Post(TEI, "/embed_all", "tei_embed_all", "Embed each token", tei.TeiTokensBody, matrices)
        )
    if OutputKind.SPARSE in kinds:
        entries = listed(listed({"$ref": f"{REF}{tei.TeiWeight.__name__}"}))
        posts.append(
            Post(TEI, "/embed_sparse", "tei_embed_sparse", "Embed sparsely", tei.TeiTokensBody, entries)
        )
    info = vendor_operation(TEI, "tei_info", "Describe the default model", tei.TeiInfo, CALL_ERRORS)
    further = (tei.TeiInfo, *((tei.TeiWeight,) if OutputKind.SPARSE in kinds else ()))
    return vendor_chapter(posts, further, {"/info": {"get": info}})


def _dense() -> list[Post]:
    body, vectors = cohere.CohereEmbedBody, CohereEmbeddings
    matrix = listed(NUMBERS)
    return [
        Post(COHERE, "/v2/embed", "cohere_embed", "Embed texts", body, vectors),
        Post(COHERE, "/v1/embed", "cohere_embed_v1", "Embed texts (v1)", body, vectors),
        Post(TEI, "/embed", "tei_embed", "Embed texts", tei.TeiEmbedBody, matrix),
        Post(TEI, "/similarity", "tei_similarity", "Compare texts", tei.TeiSimilarityBody, NUMBERS),
        Post(
            GEMINI,
            "/v1beta/models/{model}:embedContent",
            "gemini_embed",
            "Embed a content",
            gemini.GeminiEmbedBody,
            gemini.GeminiEmbedding,
        ),
        Post(
            GEMINI,
            "/v1beta/models/{model}:batchEmbedContents",
            "gemini_embed_batch",
            "Embed contents",
            gemini.GeminiBatchBody,
            gemini.GeminiEmbeddings,
        ),
        Post(
            OLLAMA,
            "/api/embed",
            "ollama_embed",
            "Embed texts",
            ollama.OllamaEmbedBody,
            ollama.OllamaEmbeddings,
        ),
        Post(
            OLLAMA,
            "/api/embeddings",
            "ollama_embed_one",
            "Embed a text",
            ollama.OllamaEmbedOneBody,
            ollama.OllamaEmbedding,
        ),
        Post(
            OLLAMA,
            "/api/show",
            "ollama_show",
            "Describe a model",
            ollama.OllamaShowBody,
            ollama.OllamaModel,
        ),
    ]

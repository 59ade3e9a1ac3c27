"""Paths in the forms of other vendors, in the document: chapters of their own beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from gateway.openapi.parts import (
    CALL_ERRORS,
    JSON,
    LIMIT_HEADERS,
    MODEL_ERRORS,
    REF,
    SECURITY,
    Chapter,
    Document,
    answer,
    errors,
    path_parameter,
)
from gateway.openapi.schemas import ErrorResponse
from services.core.catalog.types import Modality, ModelSpec, OutputKind
from services.core.errors import ErrorCode
from services.embed.vendors import cohere, gemini, ollama, tei, voyage
from services.rerank.responses import RerankingResponse
from services.rerank.vendors import cohere as cohere_rerank
from services.rerank.vendors import tei as tei_rerank

COHERE, TEI, VOYAGE = "Cohere", "Text Embeddings Inference", "Voyage"
GEMINI, OLLAMA = "Gemini", "Ollama"

TAGS = {
    COHERE: "The forms of Cohere's clients, answered by the models above. `/cohere` is a base URL, too.",
    VOYAGE: "Voyage's other calls are `/v1/embeddings` and `/v1/rerank`.",
    TEI: "The forms of Text Embeddings Inference, answered by the default model.",
    GEMINI: "Embeddings in Gemini's form. The key may come as `x-goog-api-key` or as `?key=`.",
    OLLAMA: "Embeddings in Ollama's form.",
}


class _Failure(BaseModel):
    detail: str = Field(description="What went wrong, for people.")
    code: str = Field(description="What went wrong, for programs.")
    request_id: str = Field(description="Names this request in the server's logs.")
    errors: list[dict[str, Any]] | None = Field(None, description="The refused fields, with 422.")


class CohereError(_Failure):
    """A failure as Cohere's clients read it, beside our own names."""

    message: str


class TeiError(_Failure):
    """A failure as clients of Text Embeddings Inference read it, beside our own names."""

    error: str
    error_type: Literal["Backend", "Overloaded", "Validation"]


class GeminiStatus(BaseModel):
    """The HTTP status, a sentence, and the name of the gRPC status."""

    code: int
    message: str
    status: str


class GeminiError(_Failure):
    """A failure as Gemini's clients read it, beside our own names."""

    error: GeminiStatus


class OllamaError(_Failure):
    """A failure as Ollama's clients read it, beside our own names."""

    error: str


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


_FAILURES: dict[str, type[BaseModel]] = {
    COHERE: CohereError,
    TEI: TeiError,
    VOYAGE: ErrorResponse,
    GEMINI: GeminiError,
    OLLAMA: OllamaError,
}


@dataclass(frozen=True, slots=True)
class _Post:
    """One path: what it takes, and the schema of what it answers or the class of it."""

    tag: str
    path: str
    name: str
    summary: str
    body: type[BaseModel]
    answer: type[BaseModel] | Document

    def described(self) -> Document:
        """The operation as the document has it."""
        further = (ErrorCode.ROUTE_NOT_FOUND,) if "{model}" in self.path else ()
        operation = _operation(self.tag, self.name, self.summary, self.answer, (*MODEL_ERRORS, *further))
        schema = {"$ref": f"{REF}{self.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        if "{model}" in self.path:
            operation["parameters"] = [path_parameter("model", "Id of the model.")]
        return {"post": operation}


def _listed(item: Document) -> Document:
    return {"type": "array", "items": item}


_NUMBERS: Document = _listed({"type": "number"})
_TEI_RANKING: Document = {
    "description": "Bodies with `documents` get the answer of `/v1/rerank`.",
    "anyOf": [
        _listed({"$ref": f"{REF}{tei_rerank.TeiRank.__name__}"}),
        {"$ref": f"{REF}{RerankingResponse.__name__}"},
    ],
}
_VECTORS = (OutputKind.DENSE, OutputKind.MULTI_VECTOR, OutputKind.SPARSE)


def vendor_embeddings(specs: Sequence[ModelSpec]) -> Chapter:
    """The paths over embeddings that some of these models can answer."""
    kinds = [kind for kind in _VECTORS if any(tei.gives(kind)(spec) for spec in specs)]
    posts: list[_Post] = []
    if OutputKind.DENSE in kinds:
        posts += _dense()
        if any(Modality.IMAGE in spec.modalities for spec in specs):
            posts.append(
                _Post(
                    VOYAGE,
                    "/v1/multimodalembeddings",
                    "voyage_multimodal",
                    "Embed texts and images",
                    voyage.VoyageMultimodalBody,
                    voyage.VoyageEmbeddings,
                )
            )
    if OutputKind.MULTI_VECTOR in kinds:
        matrices = _listed(_listed(_NUMBERS))
        posts.append(
            _Post(TEI, "/embed_all", "tei_embed_all", "Embed each token", tei.TeiTokensBody, matrices)
        )
    if OutputKind.SPARSE in kinds:
        entries = _listed(_listed({"$ref": f"{REF}{tei.TeiWeight.__name__}"}))
        posts.append(
            _Post(TEI, "/embed_sparse", "tei_embed_sparse", "Embed sparsely", tei.TeiTokensBody, entries)
        )
    chapter = _chapter(posts, (tei.TeiWeight,) if OutputKind.SPARSE in kinds else ())
    info = _operation(TEI, "tei_info", "Describe the default model", tei.TeiInfo, CALL_ERRORS)
    return Chapter(
        (),
        chapter.paths | {"/info": {"get": info}},
        tuple(dict.fromkeys((*chapter.answers, tei.TeiInfo, TeiError))),
        chapter.bodies,
    )


def _dense() -> list[_Post]:
    body, vectors = cohere.CohereEmbedBody, CohereEmbeddings
    matrix = _listed(_NUMBERS)
    return [
        _Post(COHERE, "/v2/embed", "cohere_embed", "Embed texts", body, vectors),
        _Post(COHERE, "/v1/embed", "cohere_embed_v1", "Embed texts (v1)", body, vectors),
        _Post(TEI, "/embed", "tei_embed", "Embed texts", tei.TeiEmbedBody, matrix),
        _Post(TEI, "/similarity", "tei_similarity", "Compare texts", tei.TeiSimilarityBody, _NUMBERS),
        _Post(
            GEMINI,
            "/v1beta/models/{model}:embedContent",
            "gemini_embed",
            "Embed a content",
            gemini.GeminiEmbedBody,
            gemini.GeminiEmbedding,
        ),
        _Post(
            GEMINI,
            "/v1beta/models/{model}:batchEmbedContents",
            "gemini_embed_batch",
            "Embed contents",
            gemini.GeminiBatchBody,
            gemini.GeminiEmbeddings,
        ),
        _Post(
            OLLAMA,
            "/api/embed",
            "ollama_embed",
            "Embed texts",
            ollama.OllamaEmbedBody,
            ollama.OllamaEmbeddings,
        ),
        _Post(
            OLLAMA,
            "/api/embeddings",
            "ollama_embed_one",
            "Embed a text",
            ollama.OllamaEmbedOneBody,
            ollama.OllamaEmbedding,
        ),
        _Post(
            OLLAMA,
            "/api/show",
            "ollama_show",
            "Describe a model",
            ollama.OllamaShowBody,
            ollama.OllamaModel,
        ),
    ]


def vendor_rankings() -> Chapter:
    """The paths over rankings."""
    two, one = cohere_rerank.CohereRerankBody, cohere_rerank.CohereRerankV1Body
    posts = [
        _Post(COHERE, "/v2/rerank", "cohere_rerank", "Rank documents", two, CohereRanking),
        _Post(COHERE, "/cohere/v1/rerank", "cohere_rerank_v1", "Rank documents (v1)", one, CohereRanking),
        _Post(TEI, "/rerank", "tei_rerank", "Rank texts", tei_rerank.TeiRerankBody, _TEI_RANKING),
    ]
    return _chapter(posts, (tei_rerank.TeiRank,))


def _chapter(posts: Iterable[_Post], further: tuple[type[BaseModel], ...]) -> Chapter:
    posts = tuple(posts)
    answers = (post.answer for post in posts if isinstance(post.answer, type))
    failures = (_FAILURES[post.tag] for post in posts)
    return Chapter(
        (),
        {post.path: post.described() for post in posts},
        tuple(dict.fromkeys((*answers, *failures, *further))),
        tuple(dict.fromkeys(post.body for post in posts)),
    )


def _operation(
    tag: str,
    name: str,
    summary: str,
    answered: type[BaseModel] | Document,
    codes: Sequence[ErrorCode] = MODEL_ERRORS,
) -> Document:
    if isinstance(answered, type):
        good = answer("The answer.", answered, LIMIT_HEADERS)
    else:
        content = {JSON: {"schema": answered}}
        good = {"description": "The answer.", "content": content, "headers": LIMIT_HEADERS}
    bad = errors(codes)
    for response in bad.values():
        response["content"] = {JSON: {"schema": {"$ref": f"{REF}{_FAILURES[tag].__name__}"}}}
    return {
        "tags": [tag],
        "summary": summary,
        "operationId": name,
        "security": SECURITY,
        "responses": {"200": good, **bad},
    }

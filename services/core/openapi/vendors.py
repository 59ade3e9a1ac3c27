"""Paths in the forms of other vendors, in the OpenAPI document: chapters of their own beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from services.core.errors import ErrorCode
from services.core.openapi.errors import ErrorResponse
from services.core.openapi.parts import (
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

COHERE, TEI, VOYAGE = "Cohere", "Text Embeddings Inference", "Voyage"
GEMINI, OLLAMA = "Gemini", "Ollama"

_TAGS = {
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


_FAILURES: dict[str, type[BaseModel]] = {
    COHERE: CohereError,
    TEI: TeiError,
    VOYAGE: ErrorResponse,
    GEMINI: GeminiError,
    OLLAMA: OllamaError,
}


@dataclass(frozen=True, slots=True)
class Post:
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
        operation = vendor_operation(
            self.tag, self.name, self.summary, self.answer, (*MODEL_ERRORS, *further)
        )
        schema = {"$ref": f"{REF}{self.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        if "{model}" in self.path:
            operation["parameters"] = [path_parameter("model", "Id of the model.")]
        return {"post": operation}


def listed(item: Document) -> Document:
    """A list of these."""
    return {"type": "array", "items": item}


NUMBERS: Document = listed({"type": "number"})


def vendor_chapter(
    posts: Sequence[Post], further: Sequence[type[BaseModel]] = (), paths: Document | None = None
) -> Chapter:
    """A chapter of these paths and of ``paths``; ``further`` are classes that their answers refer to."""
    described = {post.path: post.described() for post in posts} | (paths or {})
    tags = {tag for path in described.values() for operation in path.values() for tag in operation["tags"]}
    answers = (post.answer for post in posts if isinstance(post.answer, type))
    failures = (_FAILURES[tag] for tag in _TAGS if tag in tags)
    return Chapter(
        tags={tag: words for tag, words in _TAGS.items() if tag in tags},
        paths=described,
        answers=tuple(dict.fromkeys((*answers, *failures, *further))),
        bodies=tuple(dict.fromkeys(post.body for post in posts)),
    )


def vendor_operation(
    tag: str,
    name: str,
    summary: str,
    answered: type[BaseModel] | Document,
    codes: Sequence[ErrorCode] = MODEL_ERRORS,
) -> Document:
    """An operation whose failures have the form of the vendor that ``tag`` names."""
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

"""The whole document: chapters of the capabilities around what the gateway answers itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from gateway.openapi.batch import batch
from gateway.openapi.chat import chat
from gateway.openapi.classification import classification
from gateway.openapi.openai import openai
from gateway.openapi.own import own
from gateway.openapi.parts import REF, Chapter, Document
from gateway.openapi.ranking import embeddings, rerank
from gateway.openapi.schemas import ErrorObject, ErrorResponse, HTTPValidationError
from gateway.openapi.vendors import TAGS, vendor_embeddings, vendor_rankings
from services.core.catalog.types import Capability, ModelSpec

_DESCRIPTION = """\
Self-hosted Search Foundation API, answered by the models this server runs.

Send the key as `Authorization: Bearer <key>`; the server's operator makes keys, or runs it without.
Unknown fields of a request are ignored, and `null` means the default. Failures answer
`{detail, code, request_id, error}`, `error` as OpenAI has it; a 422 also names the fields in `errors`.
"""
_TAGS = {
    "Embeddings": "Turn texts into vectors.",
    "Rerank": "Order documents by their relevance to a query.",
    "Classification": "Sort texts under labels, known or learned.",
    "Chat": "Answer conversations of texts and images.",
    "Batch Embeddings": "Embed many texts in the background.",
    "OpenAI": "Files and batches for OpenAI's clients. `/openai/v1/embeddings` and `/models` answer as well.",
    **TAGS,
    "Models": "What this server runs.",
    "Health": "For load balancers and people.",
}


def build_openapi(
    served: Mapping[Capability, Sequence[ModelSpec]],
    *,
    max_items: int = 2048,
    max_documents: int = 2048,
    max_classify_items: int = 512,
    max_answer_tokens: int = 8192,
) -> Document:
    """Describe a gateway whose pools serve these models for these capabilities.

    ``max_items`` is the services' limit on the list form of ``input``, ``max_documents`` that on documents
    to rank, ``max_classify_items`` that on texts to classify or to learn from,
    ``max_answer_tokens`` that on answers.
    """
    chapters = [own(), *_chapters(served, max_items, max_documents, max_classify_items, max_answer_tokens)]
    paths: Document = {}
    for chapter in chapters:
        paths |= {operation.path: {"post": operation.described()} for operation in chapter.operations}
        paths |= chapter.paths
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "search-foundation",
            "version": version("search-foundation"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(chapters),
            "securitySchemes": {"HTTPBearer": {"type": "http", "scheme": "bearer"}},
        },
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
    }


def _chapters(
    served: Mapping[Capability, Sequence[ModelSpec]],
    max_items: int,
    max_documents: int,
    max_classify_items: int,
    max_answer_tokens: int,
) -> Iterator[Chapter]:
    if specs := served.get(Capability.EMBED):
        yield embeddings(specs, max_items)
        yield vendor_embeddings(specs)
    if specs := served.get(Capability.RERANK):
        yield rerank(specs, max_documents)
        yield vendor_rankings()
    if specs := served.get(Capability.CLASSIFY):
        yield classification(specs, max_classify_items)
    if specs := served.get(Capability.CHAT):
        yield chat(specs, max_answer_tokens)
    if specs := served.get(Capability.BATCH):
        yield batch(specs)
        yield openai()


def _schemas(chapters: Sequence[Chapter]) -> Document:
    """Every schema that the chapters refer to, by name."""
    operations = [operation for chapter in chapters for operation in chapter.operations]
    answers: list[type[BaseModel]] = [
        ErrorObject,
        ErrorResponse,
        HTTPValidationError,
        *(operation.answer for operation in operations),
        *(answer for chapter in chapters for answer in chapter.answers),
    ]
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for operation in operations for model in operation.schemas()),
        *((body, "validation") for chapter in chapters for body in chapter.bodies),
        *((model, "serialization") for model in answers),
    ]
    return models_json_schema(models, ref_template=f"{REF}{{model}}")[1]["$defs"]

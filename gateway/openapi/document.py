"""The whole document: chapters of the capabilities around what the gateway answers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from gateway.openapi.own import own
from services.batch import openapi as batch
from services.chat import openapi as chat
from services.classify import openapi as classify
from services.core.catalog.types import Capability, ModelSpec
from services.core.openapi.errors import ErrorObject, ErrorResponse, HTTPValidationError
from services.core.openapi.parts import REF, Bounds, Chapter, Document
from services.embed import openapi as embed
from services.rerank import openapi as rerank

_CHAPTERS: Mapping[Capability, Callable[[Sequence[ModelSpec], Bounds], Iterable[Chapter]]] = {
    Capability.EMBED: embed.chapters,
    Capability.RERANK: rerank.chapters,
    Capability.CLASSIFY: classify.chapters,
    Capability.CHAT: chat.chapters,
    Capability.BATCH: batch.chapters,
}
"""What each capability says of itself for the models it is served with."""

_DESCRIPTION = """\
Self-hosted Search Foundation API, answered by the models this server runs.

Send the key as `Authorization: Bearer <key>`; the server's operator makes keys, or runs it without.
Unknown fields of a request are ignored, and `null` means the default. Failures answer
`{detail, code, request_id, error}`, `error` as OpenAI has it; a 422 also names the fields in `errors`.
"""


def build_openapi(served: Mapping[Capability, Sequence[ModelSpec]], bounds: Bounds | None = None) -> Document:
    """Describe a gateway whose pools serve these models for these capabilities, within ``bounds``."""
    bounds = bounds or Bounds()
    described = [
        chapter
        for capability, chapters in _CHAPTERS.items()
        if (specs := served.get(capability))
        for chapter in chapters(specs, bounds)
    ]
    parts = [*described, own()]
    paths: Document = {}
    for part in parts:
        paths |= {operation.path: {"post": operation.described()} for operation in part.operations}
        paths |= part.paths
    # Our own headings stand before those of other vendors' forms.
    ordered = sorted(parts, key=lambda part: not part.operations)
    tags = {name: words for part in ordered for name, words in part.tags.items()}
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
            "schemas": _schemas(parts),
            "securitySchemes": {"HTTPBearer": {"type": "http", "scheme": "bearer"}},
        },
        "tags": [{"name": name, "description": words} for name, words in tags.items()],
    }


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

"""Documents the gateway answers by itself: health, the models, the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from gateway.topology import Topology
from services.core.catalog import VENDORS
from services.core.catalog.types import Capability, ModelSpec
from services.embed.vendors import gemini, ollama

PREFIXES = ("/v1", "/openai/v1")
"""Base URLs that clients of OpenAI are given; the second one has its files and batches, too."""

_SLASH = "(/|%2[Ff])"


@dataclass(frozen=True, slots=True)
class Document:
    """A fixed JSON answer to GET, at one ``path`` or at every path that ``pattern`` matches."""

    body: str
    path: str = ""
    pattern: str = ""


def documents(
    topology: Topology, model_infos: Mapping[str, Mapping[str, Any]], openapi: Mapping[str, Any] | None
) -> Iterator[Document]:
    """All of them. ``model_infos`` holds the ModelInfo of each of the topology's models, by id."""
    for path in ("/health", "/live"):
        yield Document(_json({"status": "ok"}), path=path)
    infos = [model_infos[model] for model in topology.models]
    listed = _json({"object": "list", "data": infos})
    for prefix in PREFIXES:
        yield Document(listed, path=f"{prefix}/models")
    if openapi is not None:
        yield Document(_json(openapi), path="/openapi.json")
    for model, info in zip(topology.models, infos, strict=True):
        owner, _, name = str(info["hugging_face_id"]).rpartition("/")
        vendors = {*VENDORS, owner} if owner and name == model else set(VENDORS)
        vendor = f"(({'|'.join(map(re.escape, sorted(vendors)))}){_SLASH})?"
        names = f"({'|'.join(PREFIXES)})/models/{vendor}{re.escape(model)}"
        yield Document(_json(info), pattern=names)


def vendor_documents(specs: Iterable[ModelSpec]) -> Iterator[Document]:
    """What Ollama's and Gemini's clients ask about the models that embed."""
    embedders = [spec for spec in specs if spec.supports(Capability.EMBED)]
    if not embedders:
        return
    yield Document(_json({"version": version("search-foundation")}), path="/api/version")
    yield Document(_json({"models": [ollama.listed(spec) for spec in embedders]}), path="/api/tags")
    described = [gemini.described(spec) for spec in embedders]
    yield Document(_json({"models": described}), path="/v1beta/models")
    for spec, body in zip(embedders, described, strict=True):
        yield Document(_json(body), path=f"/v1beta/models/{spec.id}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

"""Documents the gateway answers by itself: health, the models, the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.topology import Topology

PREFIXES = ("/v1", "/openai/v1")
"""Base URLs that clients of OpenAI are given; the second one has its files and batches, too."""

_SLASH = "(/|%2[Ff])"
_VENDORS = ("jina-ai", "jinaai")


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
        vendors = {*_VENDORS, owner} if owner and name == model else set(_VENDORS)
        vendor = f"(({'|'.join(map(re.escape, sorted(vendors)))}){_SLASH})?"
        names = f"({'|'.join(PREFIXES)})/models/{vendor}{re.escape(model)}"
        yield Document(_json(info), pattern=names)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

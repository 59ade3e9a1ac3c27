"""Types of the catalogue: what a model is and what it can do. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Capability(StrEnum):
    """What a process can serve; one gRPC service group each."""

    EMBED = "embed"
    RERANK = "rerank"
    CLASSIFY = "classify"
    BATCH = "batch"
    CHAT = "chat"


class Modality(StrEnum):
    """Kinds of input a model takes."""

    TEXT = "text"
    IMAGE = "image"
    PDF = "pdf"
    AUDIO = "audio"
    VIDEO = "video"


class OutputKind(StrEnum):
    """What one input item becomes."""

    DENSE = "dense"
    MULTI_VECTOR = "multi_vector"
    SPARSE = "sparse"
    SCORE = "score"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the catalogue.

    ``context_length`` counts tokens with specials. ``dimensions`` is the width of one output vector
    (0 where there is none). ``matryoshka`` says whether ``dimensions`` may be asked smaller; when
    ``dimension_choices`` is not empty only those values may be. ``prompts`` maps a task to the text put
    before the input. ``family`` names the network in ``core.modeling``.
    """

    id: str
    name: str
    repository: str
    revision: str
    family: str
    licence: str
    created: int
    description: str
    capabilities: frozenset[Capability]
    modalities: tuple[Modality, ...]
    outputs: tuple[OutputKind, ...]
    context_length: int
    dimensions: int
    parameters: int
    matryoshka: bool = False
    dimension_choices: tuple[int, ...] = ()
    normalize_choice: bool = True
    tasks: tuple[str, ...] = ()
    default_task: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    late_chunking: bool = False
    features: tuple[str, ...] = ()

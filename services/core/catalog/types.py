"""Types of the catalogue: what a model is and what it can do. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import ClassVar

PERMISSIVE_LICENCES = frozenset({"Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-4.0"})

# Read by pydantic when entries are loaded: a misspelt key must not pass for a default.
_REFUSE_UNKNOWN_KEYS = {"extra": "forbid"}


class Capability(StrEnum):
    """What a process can serve; one gRPC service group each."""

    EMBED = "embed"
    RERANK = "rerank"
    CLASSIFY = "classify"
    BATCH = "batch"
    CHAT = "chat"


class Family(StrEnum):
    """Kinds of network; ``core.modeling`` has one loader for each."""

    BERT = "bert"
    JINA_BERT = "jina_bert"
    JINA_V3 = "jina_v3"
    JINA_V4 = "jina_v4"
    JINA_V5_TEXT = "jina_v5_text"
    JINA_V5_OMNI = "jina_v5_omni"
    JINA_CODE = "jina_code"
    JINA_CLIP = "jina_clip"
    COLBERT_V1 = "colbert_v1"
    COLBERT_V2 = "colbert_v2"
    ELSER = "elser"
    RERANKER_V1 = "reranker_v1"
    RERANKER_V2 = "reranker_v2"
    RERANKER_M0 = "reranker_m0"
    RERANKER_V3 = "reranker_v3"
    JINA_VLM = "jina_vlm"

    @property
    def built(self) -> bool:
        """Whether this version has the network; the catalogue knows models before they can be served."""
        return self not in _UNBUILT


_UNBUILT: frozenset[Family] = frozenset()


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


class RerankMethod(StrEnum):
    """How a model orders documents by a query."""

    COSINE = "cosine"
    CROSS_ENCODER = "cross_encoder"
    LATE_INTERACTION = "late_interaction"
    LISTWISE = "listwise"


class InputType(StrEnum):
    """Role of a text for models that encode queries and documents differently (ColBERT)."""

    QUERY = "query"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What an image costs: ``tile_tokens`` for each square tile of ``tile_pixels`` on a side.

    CLIP counts tiles of the original image. The others first resize it so that its area lies between
    ``min_pixels`` and ``max_pixels`` (0: no bound); there the checkpoint's ``preprocessor_config.json``
    has the last word.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _REFUSE_UNKNOWN_KEYS

    tile_pixels: int
    tile_tokens: int = 1
    min_pixels: int = 0
    max_pixels: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the catalogue.

    Identity
        ``repository`` is empty where no weights are published; ``revision`` is a commit, or ``main`` where
        none is known. ``package`` names a Python package that carries the weights in its ``model`` folder.
        ``family`` names the network. ``parameters`` is the published figure.
        ``alias_of`` is set on entries that an operator made by an alias.

    Lengths, in tokens with specials
        ``context_length`` is the published figure; ``max_tokens`` what one sequence may hold.
        ``max_query_length`` and ``max_document_length`` cut queries and documents of rerankers and ColBERT
        (0: no limit of their own); ``document_length_limit`` is the most a caller may ask for.

    Output
        ``dimensions`` is the width of one vector, 0 where there is none. With ``matryoshka`` a caller may ask
        for any smaller width, or one of ``dimension_choices`` when there are some; ``trained_dimensions`` are
        the widths the model was trained for.

    What a request may say
        ``tasks`` and ``default_task`` (None: plain weights, no prompt); ``prompts`` maps a task to the text
        put before the input, ``adapters`` a task to its LoRA adapter. ``input_types`` replaces tasks for
        ColBERT, the last being the default. The ``*_choice`` flags say whether the field exists for the
        model: ``normalized`` (else always unit length), ``truncate`` (else over-long texts are always cut),
        ``return_multivector`` with ``return_tokenized_input``, ``return_embeddings`` of a rerank request.
        ``merged_content`` allows ``{"content": [...]}`` groups. ``classify_inputs`` and ``train_inputs`` list
        what ``/v1/classify`` and ``/v1/train`` take, ``classify_task`` the task used there.
        ``rerank_objects`` echoes every document as ``{"text": ...}`` instead of as it came.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _REFUSE_UNKNOWN_KEYS

    id: str
    name: str
    owner: str
    family: Family
    licence: str
    released: date
    description: str
    capabilities: frozenset[Capability]
    modalities: tuple[Modality, ...]
    outputs: tuple[OutputKind, ...]
    context_length: int
    parameters: int

    repository: str = ""
    revision: str = "main"
    package: str = ""
    alias_of: str = ""

    sequence_length: int = 0
    max_query_length: int = 0
    max_document_length: int = 0
    document_length_limit: int = 0

    dimensions: int = 0
    matryoshka: bool = False
    dimension_choices: tuple[int, ...] = ()
    trained_dimensions: tuple[int, ...] = ()

    tasks: tuple[str, ...] = ()
    default_task: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])
    input_types: tuple[InputType, ...] = ()
    normalize_choice: bool = True
    truncate_choice: bool = True
    multivector_choice: bool = False
    late_chunking: bool = False
    merged_content: bool = False

    classify_inputs: tuple[Modality, ...] = ()
    train_inputs: tuple[Modality, ...] = ()
    classify_task: str | None = None

    rerank: RerankMethod | None = None
    rerank_objects: bool = False
    return_embeddings_choice: bool = False

    images: ImageRules | None = None

    @property
    def created(self) -> int:
        """Unix time of the release, midnight UTC."""
        return int(datetime.combine(self.released, datetime.min.time(), UTC).timestamp())

    @property
    def public_id(self) -> str:
        """The id as ``/v1/models`` lists it: ``jina-ai/<id>`` for Jina's models, else the plain id."""
        return f"jina-ai/{self.id}" if self.owner == "jina-ai" and not self.alias_of else self.id

    @property
    def weights_id(self) -> str:
        """Id of the entry whose weights serve this one: its own, or that of an alias's target."""
        return self.alias_of or self.id

    @property
    def pinned(self) -> bool:
        """Whether ``revision`` is a commit."""
        return self.revision != "main"

    @property
    def max_tokens(self) -> int:
        """Tokens one sequence may hold, specials included."""
        return self.sequence_length or self.context_length

    @property
    def commercial(self) -> bool:
        """Whether the licence allows commercial use without a further agreement."""
        return self.licence in PERMISSIVE_LICENCES

    def supports(self, capability: Capability) -> bool:
        """Whether the model can serve ``capability``."""
        return capability in self.capabilities

    def prompt(self, task: str | None) -> str:
        """The text put before an input for ``task`` (None: the model's default task)."""
        return self.prompts.get(task or self.default_task or "", "")

    def adapter(self, task: str | None) -> str | None:
        """Name of the LoRA adapter for ``task`` (None: the model's default task), if it has one."""
        return self.adapters.get(task or self.default_task or "")

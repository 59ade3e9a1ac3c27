"""Text Embeddings Inference: ``/embed``, ``/embed_all``, ``/embed_sparse``, ``/similarity`` and ``/info``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, Field, SkipValidation, WithJsonSchema

from services.core.catalog.types import Family, Modality, ModelSpec, OutputKind
from services.core.errors import FieldError, validation_error
from services.core.requests.fields import Flag
from services.core.requests.foreign import ForeignBody, named, only
from services.core.requests.parsing import rest_location
from services.core.settings import Settings
from services.embed.types import SparseWeights

LOCATE = named({"input": "inputs", "normalized": "normalize"})
LOCATE_SENTENCES = named({"input": "inputs"})

_RIGHT_ONLY = "Input should be 'Right': texts are cut at their end only"
_LIST = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_Texts = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _LIST]})]
_Prompt = Annotated[Any, WithJsonSchema({"type": ["string", "null"]})]


class _Options(ForeignBody):
    truncate: Flag = Field(None, description="Cut texts that are too long. Models that leave no choice do.")
    truncation_direction: Annotated[Any, only(_RIGHT_ONLY, "Right", "right")] = None
    prompt_name: _Prompt = Field(None, description="`query`, `document`, `passage` or a task of the model.")

    def options(self) -> dict[str, Any]:
        """What was asked for, in our words."""
        return {"truncate": self.truncate, "prompt_name": self.prompt_name}


class TeiTokensBody(_Options):
    """Texts for `/embed_all` and `/embed_sparse`."""

    inputs: _Texts = Field(description="A text, or a list of texts.")
    model: SkipValidation[str | None] = Field(None, description="An addition: instead of the default model.")

    def our_fields(self, default: str) -> dict[str, Any]:
        """Put the body into our words."""
        named_model = {"model": default if self.model is None else self.model}
        return {**named_model, "input": self.inputs, **self.options()}


class TeiEmbedBody(TeiTokensBody):
    """Texts for `/embed`."""

    normalize: Flag = Field(True, description="Scale vectors to length 1.")
    dimensions: SkipValidation[int | None] = Field(None, description="Keep only the first components.")

    def our_fields(self, default: str) -> dict[str, Any]:
        """Put the body into our words."""
        fields = super().our_fields(default)
        return {**fields, "normalized": self.normalize, "dimensions": self.dimensions}


class TeiSentences(ForeignBody):
    """One text and those to compare it with."""

    source_sentence: str
    sentences: Annotated[Any, WithJsonSchema(_LIST)]


class TeiParameters(_Options):
    """How texts are read."""


class TeiSimilarityBody(ForeignBody):
    """Texts for `/similarity`."""

    inputs: TeiSentences
    parameters: TeiParameters | None = None

    def our_fields(self, default: str) -> dict[str, Any]:
        """Put the body into our words: the source goes before the others."""
        others = self.inputs.sentences
        if not isinstance(others, list) or not others:
            message = "Input should be a list of at least one text"
            place = rest_location(None, ("inputs", "sentences"))
            raise validation_error([FieldError(place, message, "list_type", others)])
        options = {} if self.parameters is None else self.parameters.options()
        return {"model": default, "input": [self.inputs.source_sentence, *others], **options}


class TeiWeight(BaseModel):
    """One entry of the vocabulary."""

    index: int
    value: float


class TeiInfo(BaseModel):
    """What the default model is, and the limits of this server; null where there is none."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, dict[str, Any]] = Field(description="`embedding` with its `pooling`.")
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool = Field(description="Whether texts are cut that no request asks to cut.")
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


_POOLING = {
    Family.JINA_CODE: "last_token",
    Family.JINA_V5_TEXT: "last_token",
    Family.JINA_V5_OMNI: "last_token",
    Family.ELSER: "splade",
}
_SWITCHES = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last_token"}


def gives(kind: OutputKind) -> Callable[[ModelSpec], bool]:
    """Return what tells whether a model's answers are vectors of this kind."""

    def can(spec: ModelSpec) -> bool:
        return kind in spec.outputs and (kind is OutputKind.DENSE or OutputKind.DENSE not in spec.outputs)

    return can


def gives_tokens(spec: ModelSpec) -> bool:
    """Tell whether a model has a vector for each token: of its own, or before it pools them into one."""
    texts_alone = set(spec.modalities) == {Modality.TEXT} and not spec.multivector_choice
    return gives(OutputKind.MULTI_VECTOR)(spec) or (OutputKind.DENSE in spec.outputs and texts_alone)


def pooling(spec: ModelSpec, folder: Path) -> str:
    """Say how a model makes one vector of many, which the folder of its weights may tell."""
    if spec.family in _POOLING:
        return _POOLING[spec.family]
    told = folder / "1_Pooling" / "config.json"
    switches = orjson.loads(told.read_bytes()) if told.is_file() else {}
    return next((name for switch, name in _SWITCHES.items() if switches.get(switch)), "mean")


def info(spec: ModelSpec, settings: Settings, pooled: str, dtype: str, batch_tokens: int) -> dict[str, Any]:
    """Describe a model and the limits of this process; ``pooled`` is what ``pooling`` says."""
    return TeiInfo(
        model_id=spec.repository or spec.id,
        model_sha=spec.revision if spec.pinned else None,
        model_dtype=dtype,
        model_type={"embedding": {"pooling": pooled}},
        max_concurrent_requests=settings.max_concurrent_calls,
        max_input_length=spec.context_length,
        max_batch_tokens=batch_tokens,
        max_batch_requests=None,
        max_client_batch_size=settings.max_items,
        auto_truncate=not spec.truncate_choice,
        tokenization_workers=settings.workers,
        version=version("search-foundation"),
        sha=None,
        docker_label=None,
    ).model_dump()


def sparse_items(vectors: Sequence[SparseWeights]) -> list[Any]:
    """Lay out entries of the vocabulary by their numbers."""
    return [
        [{"index": index, "value": weight} for index, weight in zip(vector.ids, vector.weights, strict=True)]
        for vector in vectors
    ]

"""Ollama's ``/api/embed``, ``/api/embeddings`` and ``/api/show``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any

from pydantic import BaseModel, Field, SkipValidation, WithJsonSchema

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.errors import FieldError, validation_error
from services.core.requests.fields import Flag, Whole
from services.core.requests.foreign import ForeignBody, named, only
from services.core.requests.parsing import rest_location

LOCATE = named({})
LOCATE_ONE = named({"input": "prompt"})

_TAG = ":latest"
_KEEP_ALIVE = "The server decides how long models stay in memory"


class OllamaOptions(ForeignBody):
    """Of Ollama's options one bears on vectors; those of sampling and of its machine do not."""

    num_ctx: Annotated[int | None, Whole] = Field(
        None, description="Taken if it is at least the model's context: texts are not cut sooner."
    )


class _Body(ForeignBody):
    model: str = Field(description="Id of the model, with `:latest` or without.")
    options: OllamaOptions | None = Field(None, description="Other options change no vector.")
    keep_alive: str | int | float | None = Field(None, description=f"{_KEEP_ALIVE}.")
    truncate: Flag = Field(True, description="Cut texts that are too long instead of refusing them.")

    def check(self, spec: ModelSpec) -> None:
        """Raise for a context that is shorter than the model's."""
        wanted = None if self.options is None else self.options.num_ctx
        if wanted is not None and wanted < spec.context_length:
            message = f"Texts are cut at the model's {spec.context_length} tokens, not sooner"
            place = rest_location(None, ("options", "num_ctx"))
            raise validation_error([FieldError(place, message, "not_supported", wanted)])


class OllamaEmbedBody(_Body):
    """Texts for `/api/embed`."""

    input: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = Field(None, description="A text, or a list of texts; none ask whether the model is there.")
    dimensions: SkipValidation[int | None] = Field(None, description="Keep only the first components.")

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words."""
        return {
            "model": without_tag(self.model),
            "input": self.input,
            "dimensions": self.dimensions,
            "truncate": self.truncate is not False,
        }


class OllamaEmbedOneBody(_Body):
    """A text for `/api/embeddings`."""

    prompt: SkipValidation[str | None] = Field(None, description="The text.")

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words."""
        return {
            "model": without_tag(self.model),
            "input": self.prompt,
            "truncate": self.truncate is not False,
        }


class OllamaShowBody(ForeignBody):
    """The model to describe."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of `model`.")
    verbose: Flag = None
    system: Annotated[Any, only("Embedding models have no system prompt", "")] = None
    template: Annotated[Any, only("Embedding models have no template", "")] = None

    def named(self) -> str:
        """Return the model's id; raises ``ServiceError``."""
        name = self.model or self.name
        if not name:
            place = rest_location(None, ("model",))
            raise validation_error([FieldError(place, "Field required", "missing", name)])
        return without_tag(name)


class OllamaEmbeddings(BaseModel):
    """The vectors; durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(BaseModel):
    """The vector."""

    embedding: list[float]


class OllamaDetails(BaseModel):
    """What kind of network it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A model in full."""

    modelfile: str
    parameters: str
    template: str
    license: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


def embeddings(model: str, vectors: Any, tokens: int, call: Call) -> dict[str, Any]:
    """Lay out an answer of ``/api/embed``."""
    return {
        "model": model,
        "embeddings": vectors,
        "total_duration": round((time.monotonic() - call.started) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }


def shown(spec: ModelSpec) -> dict[str, Any]:
    """Describe a model."""
    family = str(spec.family)
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": spec.licence,
        "details": details(spec),
        "model_info": {
            "general.architecture": family,
            "general.basename": spec.name,
            "general.parameter_count": spec.parameters,
            f"{family}.context_length": spec.context_length,
            f"{family}.embedding_length": spec.dimensions,
        },
        "capabilities": ["embedding"],
        "modified_at": _time(spec),
    }


def listed(spec: ModelSpec) -> dict[str, Any]:
    """Describe a model in the list of all; the digest stands for the version of its weights."""
    version = f"{spec.repository or spec.id}@{spec.revision}"
    return {
        "name": f"{spec.id}{_TAG}",
        "model": f"{spec.id}{_TAG}",
        "modified_at": _time(spec),
        "digest": sha256(version.encode()).hexdigest(),
        "details": details(spec),
    }


def details(spec: ModelSpec) -> Mapping[str, Any]:
    """Say what kind of network a model is."""
    family = str(spec.family)
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": _size(spec.parameters),
        "quantization_level": "",
    }


def without_tag(name: str) -> str:
    """Take the only tag there is away."""
    return name.removesuffix(_TAG)


def _time(spec: ModelSpec) -> str:
    return f"{spec.released.isoformat()}T00:00:00Z"


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"

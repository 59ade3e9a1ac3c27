"""What ``GET /v1/models`` says of a model (``ModelInfo`` of the OpenAPI document)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.core.catalog.types import Capability, ModelSpec, OutputKind

_OUTPUTS = {
    OutputKind.DENSE: "embeddings",
    OutputKind.MULTI_VECTOR: "embeddings",
    OutputKind.SPARSE: "embeddings",
    OutputKind.SCORE: "scores",
    OutputKind.TEXT: "text",
}
_FREE = dict.fromkeys(
    ("prompt", "completion", "image", "request", "input_cache_read", "input_cache_write"), "0"
)
_SAMPLING = (
    *("temperature", "top_p", "top_k", "seed", "stop", "max_tokens"),
    *("presence_penalty", "frequency_penalty", "logprobs", "response_format"),
)


def model_info(spec: ModelSpec) -> dict[str, Any]:
    """Render one entry; ``object`` and ``owned_by`` are additions for OpenAI's clients."""
    chat = spec.supports(Capability.CHAT)
    return {
        "id": spec.public_id,
        "object": "model",
        "owned_by": spec.owner,
        "hugging_face_id": spec.repository,
        "name": spec.name,
        "created": spec.created,
        "input_modalities": list(map(str, spec.modalities)),
        "output_modalities": list(dict.fromkeys(_OUTPUTS[kind] for kind in spec.outputs)),
        "quantization": "",
        "context_length": spec.context_length,
        "max_output_length": spec.context_length if chat else spec.dimensions,
        "pricing": dict(_FREE),
        "supported_sampling_parameters": list(_SAMPLING) if chat else [],
        "supported_features": [],
        "description": spec.description,
        "datacenters": [],
    }


def models_list(specs: Iterable[ModelSpec]) -> dict[str, Any]:
    """Render the answer of ``GET /v1/models``."""
    return {"object": "list", "data": [model_info(spec) for spec in specs]}

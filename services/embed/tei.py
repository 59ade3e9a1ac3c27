"""The form of Text Embeddings Inference, over the same capability: fields in, fields out, no logic."""

from __future__ import annotations

from typing import Any

from services.core.errors import FieldError, validation_error

_NAMES = {
    "inputs": "input",
    "normalize": "normalized",
    "truncate": "truncate",
    "dimensions": "dimensions",
    "prompt_name": "prompt_name",
    "model": "model",
}


def our_fields(sent: dict[str, Any], default_model: str) -> dict[str, Any]:
    """Put a body of ``/embed`` into our words; raises ``ServiceError`` VALIDATION_ERROR."""
    if sent.get("truncation_direction") not in (None, "Right", "right"):
        message = "Input should be 'Right': texts are cut at their end only"
        raise validation_error(
            [FieldError("body -> truncation_direction", message, "value_error", sent["truncation_direction"])]
        )
    if "inputs" not in sent:
        raise validation_error([FieldError("body -> inputs", "Field required", "missing", sent)])
    return {"model": default_model} | {ours: sent[name] for name, ours in _NAMES.items() if name in sent}

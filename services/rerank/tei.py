"""The form of Text Embeddings Inference, over the same capability: fields in, fields out, no logic."""

from __future__ import annotations

from typing import Any

from services.core.errors import FieldError, validation_error
from services.rerank.types import RerankResult


def our_fields(sent: dict[str, Any], default_model: str) -> dict[str, Any]:
    """Put a body of ``/rerank`` into our words; raises ``ServiceError`` VALIDATION_ERROR."""
    if sent.get("raw_scores") not in (None, False):
        message = "Scores are answered as '/v1/rerank' has them; there are no raw ones"
        raise validation_error([FieldError("body -> raw_scores", message, "value_error", sent["raw_scores"])])
    fields = {name: sent[name] for name in ("model", "query", "truncate") if name in sent}
    shown = sent.get("return_text")
    return {
        "model": default_model,
        "truncate": False,
        **fields,
        "documents": sent["texts"],
        "return_documents": False if shown is None else shown,
    }


def answer(result: RerankResult, texts: list[Any] | None) -> list[dict[str, Any]]:
    """Lay out the answer; ``texts`` are those to be shown."""
    return [
        {"index": index, "score": score} | ({} if texts is None else {"text": texts[index]})
        for index, score in zip(result.indices, result.scores, strict=True)
    ]

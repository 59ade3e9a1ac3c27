"""Cohere's form of a ranking, over the same capability: fields in, fields out, no logic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.rerank.types import RerankResult

_NAMES = ("model", "query", "documents", "top_n", "max_tokens_per_doc")


def our_fields(sent: dict[str, Any]) -> dict[str, Any]:
    """Put a body of ``/v2/rerank`` into our words: documents are answered only where asked for."""
    fields = {name: sent[name] for name in _NAMES if name in sent}
    shown = sent.get("return_documents")
    return {**fields, "return_documents": False if shown is None else shown}


def answer(result: RerankResult, documents: Sequence[Any] | None, request_id: str) -> dict[str, Any]:
    """Lay out the answer; ``documents`` are those to be shown."""
    results: list[dict[str, Any]] = []
    for index, score in zip(result.indices, result.scores, strict=True):
        item: dict[str, Any] = {"index": index, "relevance_score": score}
        if documents is not None:
            shown = documents[index]
            item["document"] = {"text": shown} if isinstance(shown, str) else shown
        results.append(item)
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return {"id": request_id, "results": results, "meta": meta}

"""Cohere's forms of embeddings, over the same capability: fields in, fields out, no logic."""

from __future__ import annotations

from typing import Any, cast

from services.core.errors import FieldError, validation_error
from services.core.requests.parsing import BODY, SEPARATOR
from services.embed.types import EmbedResult, Result

_TRUNCATE = {"NONE": False, "END": True}


def our_fields(sent: dict[str, Any]) -> dict[str, Any]:
    """Put a body of ``/v1/embed`` or ``/v2/embed`` into our words; raises ``ServiceError``."""
    fields = {name: sent[name] for name in ("model", "input_type", "embedding_types") if name in sent}
    fields["input"] = _inputs(sent)
    if sent.get("output_dimension") is not None:
        fields["dimensions"] = sent["output_dimension"]
    truncate = sent.get("truncate")
    if truncate is None:
        truncate = "END"
    if not isinstance(truncate, str) or truncate not in _TRUNCATE:
        message = "Input should be 'NONE' or 'END': texts are cut at their end only"
        raise _refused("truncate", message, truncate)
    fields["truncate"] = _TRUNCATE[truncate]
    return fields


def answer(
    result: Result, columns: dict[str, Any], sent: dict[str, Any], request_id: str, version: str
) -> Any:
    """Lay out the answer; ``columns`` holds the JSON of all vectors by kind of number."""
    by_type = version == "2" or sent.get("embedding_types") is not None
    texts = [text for text in cast("list[Any]", sent.get("texts") or []) if isinstance(text, str)]
    return {
        "id": request_id,
        "texts": texts,
        "embeddings": columns if by_type else columns["float"],
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"input_tokens": result.usage.total},
        },
        "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
    }


def one_vector_each(result: Result) -> EmbedResult:
    """Return the result of a model that gives one vector for each text; raises ``ServiceError`` else."""
    if isinstance(result, EmbedResult):
        return result
    raise _refused("model", f"Model '{result.model}' gives other vectors than this form has", result.model)


def _inputs(sent: dict[str, Any]) -> list[Any]:
    inputs: list[Any] = []
    if isinstance(texts := sent.get("texts"), list):
        inputs += cast("list[Any]", texts)
    if isinstance(images := sent.get("images"), list):
        inputs += [{"image": image} for image in cast("list[Any]", images)]
    if isinstance(mixed := sent.get("inputs"), list):
        inputs += [_content(item) for item in cast("list[Any]", mixed)]
    if not inputs:
        raise _refused("texts", "Field required", sent.get("texts"))
    return inputs


def _content(item: Any) -> Any:
    parts = cast("dict[str, Any]", item).get("content") if isinstance(item, dict) else None
    if not isinstance(parts, list):
        raise _refused("inputs", "Each input should be an object with a list 'content'", item)
    contents = [_part(part) for part in cast("list[Any]", parts)]
    return contents[0] if len(contents) == 1 else {"content": contents}


def _part(part: Any) -> Any:
    if isinstance(part, dict):
        known = cast("dict[str, Any]", part)
        if known.get("type") == "text":
            return {"text": known.get("text")}
        image = known.get("image_url")
        if known.get("type") == "image_url" and isinstance(image, dict):
            return {"image": cast("dict[str, Any]", image).get("url")}
    raise _refused("inputs", "Each part should be of the type 'text' or 'image_url'", part)


def _refused(field: str, message: str, value: object) -> Exception:
    return validation_error([FieldError(SEPARATOR.join((BODY, field)), message, "value_error", value)])

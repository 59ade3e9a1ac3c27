"""Lines of a job's input, and the lines of its output and error files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from services.core.requests.texts import Location, RefusedItem, read_text

DUPLICATE = "duplicate"
TOO_LONG = "too_long"
MAX_LINE_BYTES = 1 << 20

_INVALID = "VALIDATION_ERROR"
_MESSAGES = {
    DUPLICATE: "An earlier line of this job has the same 'custom_id'.",
    TOO_LONG: f"The line is longer than {MAX_LINE_BYTES:,} bytes.",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line has no vectors."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its number in the input from 0, and its texts or what is wrong with it."""

    number: int
    custom_id: str | None
    texts: tuple[str, ...] = ()
    fault: Fault | None = None


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """Words for what is wrong with a line."""


def custom_id_of(data: bytes) -> str | None:
    """Return the ``custom_id`` of a line, None for a line without a good one."""
    try:
        value: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    found = cast("dict[str, Any]", value).get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and found else None


def parse_line(number: int, data: bytes, known: str | None, *, model: str, max_items: int) -> Line:
    """Read a line; ``known`` is what the look at the whole input has found wrong with it."""
    if known is not None:
        return Line(number, custom_id_of(data), fault=Fault(_INVALID, _MESSAGES[known]))
    custom_id = None
    try:
        fields = _object(data)
        custom_id = _custom_id(fields)
        return Line(number, custom_id, _texts(fields, model, max_items))
    except _Refused as refused:
        return Line(number, custom_id, fault=Fault(_INVALID, str(refused)))


def output_line(job_id: str, line: Line, model: str, vectors: NDArray[np.float32], tokens: int) -> bytes:
    """Write the result of a line: ``vectors`` (texts, width), C-contiguous. The same for the same line."""
    name = _line_name(job_id, line.number)
    body = {
        "model": model,
        "object": "list",
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
        "data": [
            {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(vectors)
        ],
    }
    return _dump(
        {
            "id": f"batch_req_{name}",
            "custom_id": line.custom_id,
            "response": {"status_code": 200, "request_id": name, "body": body},
            "error": None,
        }
    )


def error_line(job_id: str, line: Line, fault: Fault) -> bytes:
    """Write why a line failed."""
    return _dump(
        {
            "id": f"batch_req_{_line_name(job_id, line.number)}",
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": fault.code, "message": fault.message},
        }
    )


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _line_name(job_id: str, number: int) -> str:
    return hashlib.blake2b(f"{job_id}:{number}".encode(), digest_size=12).hexdigest()


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _Refused(f"The line is not valid JSON: {error.msg} (column {error.colno}).") from None
    if not isinstance(value, dict):
        raise _Refused("The line should be a JSON object.")
    return cast("dict[str, Any]", value)


def _custom_id(fields: dict[str, Any]) -> str:
    found = fields.get("custom_id")
    if not isinstance(found, str) or not found:
        raise _Refused("'custom_id' should be a text that is not empty.")
    return found


def _texts(fields: dict[str, Any], model: str, max_items: int) -> tuple[str, ...]:
    body = fields.get("body")
    if not isinstance(body, dict) or "input" not in body:
        raise _Refused("'body' should be an object with 'input'.")
    given = cast("dict[str, Any]", body)["input"]
    if not isinstance(given, list):
        return (_text(given, (), model),)
    items = cast("list[object]", given)
    if not 1 <= len(items) <= max_items:
        raise _Refused(f"'body.input' should have 1 to {max_items} items.")
    return tuple(_text(item, (index,), model) for index, item in enumerate(items))


def _text(item: object, at: Location, model: str) -> str:
    try:
        return read_text(item, at, model)
    except RefusedItem as refused:
        raise _Refused(_words(refused)) from None


def _words(refused: RefusedItem) -> str:
    details = refused.details
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in details.get("loc", ()))
    kind = details["type"]
    if isinstance(kind, str):
        kinds = {"string_type": "should be a text", "missing": "is missing"}
        return f"'body.input{place}' {kinds.get(kind, kind)}."
    return f"'body.input{place}': {kind.message()}"


def split_lines(data: bytes) -> Sequence[bytes]:
    """Cut a piece of the input into its lines; blank ones do not count."""
    return [line for line in data.split(b"\n") if line.strip()]

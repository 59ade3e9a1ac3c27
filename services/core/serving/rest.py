"""The REST codec: ``google.api.HttpBody`` to plain Python and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import orjson
from google.api import httpbody_pb2

from services.core.errors import FieldError, validation_error
from services.core.requests.parsing import BODY

JSON = "application/json"

_NUMBERS_AT_ONCE = 65_536
"""Takes about 1.5 ms to write as JSON."""


def decode(body: httpbody_pb2.HttpBody) -> dict[str, Any]:
    """Parse a JSON object, whatever content type the caller named.

    Raises:
        ServiceError: 422 ``json_invalid`` for malformed JSON, invalid UTF-8, lone surrogates and nesting
            beyond 1,024 levels; 422 ``dict_type`` for any other JSON value than an object.
    """
    try:
        value = orjson.loads(body.data)
    except orjson.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise validation_error([FieldError(BODY, message, "json_invalid")]) from None
    if not isinstance(value, dict):
        raise validation_error([FieldError(BODY, "Input should be a valid JSON object", "dict_type", value)])
    return cast("dict[str, Any]", value)


def encode(payload: Any) -> httpbody_pb2.HttpBody:
    """Render JSON with keys in their order.

    numpy arrays (C-contiguous) are written as they are; a float32 gets the shortest digits that read back as
    the same float32.
    """
    return httpbody_pb2.HttpBody(
        content_type=JSON, data=orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    )


async def in_slices(
    count: int, numbers: int, items: Callable[[int, int], list[Any]]
) -> list[Any] | orjson.Fragment:
    """Lay out a long list for ``encode``, letting the event loop go between slices of it.

    ``items(first, last)`` makes the JSON values of a part, each with about ``numbers`` numbers.
    """
    step = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    if count <= step:
        return items(0, count)
    written: list[bytes] = []
    for first in range(0, count, step):
        part = items(first, min(first + step, count))
        written.append(orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        await asyncio.sleep(0)
    return orjson.Fragment(b"[" + b",".join(written) + b"]")

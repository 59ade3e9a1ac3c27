"""The REST codec: ``google.api.HttpBody`` to plain Python and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import orjson
from google.api import httpbody_pb2

from services.core.errors import FieldError, validation_error
from services.core.requests.json_parts import items
from services.core.requests.parsing import BODY
from services.core.serving.bodies import SMALL_BYTES, Bodies, Hold, not_json

JSON = "application/json"

_NUMBERS_AT_ONCE = 65_536
"""Takes about 1.5 ms to write as JSON."""


_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")


@dataclass(slots=True)
class Body:
    """The body of a REST call, as the pipeline gives it to servicers in place of ``google.api.HttpBody``.

    ``data`` is what the caller sent, without a copy; ``decode`` lets go of it. ``hold`` counts what is made
    of it and takes more memory.
    """

    data: memoryview
    bodies: Bodies
    key_id: str
    hold: Hold


async def decode(body: Body, *, keep: bool = False) -> dict[str, Any]:
    """Parse a JSON object, whatever content type the caller named; a large one part by part.

    The bytes are let go of afterwards unless ``keep`` says that they are still wanted.

    Raises:
        ServiceError: 422 ``json_invalid`` for malformed JSON, invalid UTF-8, lone surrogates and nesting
            beyond 1,024 levels; 422 ``dict_type`` for any other JSON value than an object; 422
            ``too_many_values`` and ``string_too_long``.
    """
    data = body.data
    start = bytes(data[: len(_UTF8_MARK)])
    if start == _UTF8_MARK:  # as a reader may take it, by RFC 8259
        data = body.data = data[len(_UTF8_MARK) :]
    elif start.startswith(_UTF16_STARTS):
        message = "is not valid JSON: it is encoded as UTF-16 and should be UTF-8"
        raise validation_error([FieldError(BODY, message, "json_invalid")])
    if len(data) > SMALL_BYTES:
        value: Any = await body.bodies.object_of(data, body.key_id, body.hold)
    else:
        value = _parse(data)
    if not keep:
        body.data = memoryview(b"")
    return value


async def raw_items(body: Body, name: str) -> list[memoryview]:
    """Return the bytes of each item of a list in a body that ``decode`` has parsed and kept."""
    return items(await body.bodies.outline_of(body.data), name)


def _parse(data: memoryview) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise not_json(error.msg, error.lineno, error.colno) from None
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
    written[0], written[-1] = b"[" + written[0], written[-1] + b"]"
    joined = orjson.Fragment(b",".join(written))
    await asyncio.sleep(0)
    return joined

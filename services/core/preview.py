"""Cuts of values that are small enough for a header, whatever a caller sent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

_DEPTH = 3
_STRING_BYTES = 120
_ENTRIES = 4


def json_width(char: str) -> int:
    """Bytes of one character inside an ASCII JSON string."""
    return len(json.dumps(char)) - 2


def percent_width(char: str) -> int:
    """Bytes of one character in a percent-encoded gRPC message."""
    return 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())


def clip(text: str, limit: int, width: Callable[[str], int] = json_width) -> str:
    """Cut ``text`` so that its encoded form has at most ``limit`` bytes; a cut ends in ``...``.

    Lone surrogates, which strict parsers of JSON and UTF-8 refuse, become question marks.
    """
    if len(text) <= limit and _is_plain(text):
        return text
    text = text[: limit + 1].encode("utf-8", "replace").decode()
    used = 0
    cut = 0
    for position, char in enumerate(text):
        used += width(char)
        if used <= limit - 3:
            cut = position + 1
        if used > limit:
            return text[:cut] + "..."
    return text


_is_plain = re.compile(r"[ !#$&-\[\]-~]*").fullmatch
"""Of characters that take one byte wherever an error is told."""


def preview(value: Any, depth: int = _DEPTH) -> Any:
    """A JSON value that shows what ``value`` was in at most a few hundred bytes.

    Long strings are cut, lists and objects keep their first entries and tell how many more there were.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 64 else "(a very large integer)"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return clip(value, _STRING_BYTES)
    if isinstance(value, Mapping):
        return _preview_mapping(cast("Mapping[Any, Any]", value), depth)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return _preview_sequence(cast("Sequence[Any]", value), depth)
    return f"({type(value).__name__})"


def _preview_sequence(values: Sequence[Any], depth: int) -> Any:
    if depth == 0:
        return f"({len(values)} items)"
    shown = [preview(value, depth - 1) for value in values[:_ENTRIES]]
    return shown if len(values) <= _ENTRIES else [*shown, f"({len(values) - _ENTRIES} more)"]


def _preview_mapping(values: Mapping[Any, Any], depth: int) -> Any:
    if depth == 0:
        return f"({len(values)} fields)"
    shown = {
        clip(str(key), _STRING_BYTES): preview(value, depth - 1)
        for key, value in islice(values.items(), _ENTRIES)
    }
    return shown if len(values) <= _ENTRIES else {**shown, "...": f"({len(values) - _ENTRIES} more)"}

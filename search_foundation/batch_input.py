"""The request for a job, made of a file of lines or of a URL."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

MAX_LINES = 10_000
"""Lines that a request may carry; more go by URL."""

_URL = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)


class InputError(Exception):
    """The file is none that can be sent; the message is a sentence for the user."""


def source(word: str) -> dict[str, Any]:
    """Give the ``input`` or ``input_url`` of a request: ``word`` is a file, ``-`` or a URL."""
    if _URL.match(word):
        return {"input_url": word}
    if word == "-":
        return {"input": _lines(sys.stdin.buffer, "standard input")}
    try:
        with Path(word).open("rb") as file:
            return {"input": _lines(file, word)}
    except OSError as error:
        raise InputError(f"Cannot read {word}: {error.strerror}.") from error


def _lines(file: Iterable[bytes], name: str) -> list[Any]:
    found: list[Any] = []
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        if len(found) == MAX_LINES:
            raise InputError(
                f"{name} has more than {MAX_LINES:,} lines. Put it where the server can read it,"
                " and submit its https://, s3:// or gs:// URL instead."
            )
        found.append(_object(text, name, number))
    if not found:
        raise InputError(f"{name} has no lines.")
    return found


def _object(text: bytes, name: str, number: int) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{name}, line {number}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}, line {number}: not a JSON object.")
    return value

"""Files that stand in a request as text: base64, alone or in a ``data:`` URI."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

from services.core.media.errors import MediaError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BLANKS = str.maketrans("", "", " \t\r\n")
_URL_SAFE = str.maketrans("-_", "+/")


def is_url(source: str) -> bool:
    """Whether ``source`` is to be fetched; of whichever scheme, so that a wrong one is told as such."""
    return _URL.match(source) is not None


def expected_bytes(source: str) -> int:
    """Return at most how many bytes ``source``, which is no URL, stands for."""
    return len(source) * 3 // 4


def read_inline(source: str, max_bytes: int) -> bytes:
    """Return the bytes of base64 or a ``data:`` URI.

    Missing padding, line breaks and the URL-safe alphabet are taken. MediaError for anything else, and for
    more than ``max_bytes``.
    """
    if source[:5].lower() != "data:":
        return _base64(source, max_bytes, "it is neither a URL nor base64")
    head, comma, data = source[5:].partition(",")
    if not comma:
        raise MediaError("its data: URI has no comma before the data")
    if head.lower().rstrip().endswith(";base64"):
        return _base64(data, max_bytes, "the data of its data: URI is not base64")
    _check(len(data) // 3, max_bytes)
    decoded = unquote_to_bytes(data)
    _check(len(decoded), max_bytes)
    return decoded


def _base64(text: str, max_bytes: int, complaint: str) -> bytes:
    if len(text) > max_bytes * 3 // 2 + 64:  # line breaks and all
        raise MediaError(f"it is larger than {max_bytes:,} bytes")
    try:
        data = _decoded(text)
    except ValueError as error:
        raise MediaError(complaint) from error
    if not data:
        raise MediaError("it is empty")
    _check(len(data), max_bytes)
    return data


def _decoded(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        plain = unquote(text) if "%" in text else text
        plain = plain.translate(_BLANKS).translate(_URL_SAFE).rstrip("=")
        return binascii.a2b_base64(plain + "=" * (-len(plain) % 4), strict_mode=True)


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaError(f"it is larger than {max_bytes:,} bytes")

"""Bodies of ``multipart/form-data`` (RFC 7578), as forms and SDKs upload files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from services.core.errors import FieldError, ServiceError, validation_error
from services.core.requests.parsing import BODY

_MAX_PARTS = 32
_MAX_HEADERS = 8192
_MAX_BOUNDARY = 70
_BLOCK_BYTES = 1 << 18
"""Searched at a time: what finds bytes keeps the interpreter from everybody else."""


@dataclass(frozen=True, slots=True)
class FormPart:
    """A field of a form; ``filename`` is None where it is no file."""

    name: str
    filename: str | None
    content: memoryview


def form_parts(body: memoryview) -> Iterator[FormPart]:
    """Give the fields of a form, which are parts of ``body`` and no copies.

    The boundary is the one that the body begins with: forms have nothing before it.
    Raises ``ServiceError`` 422 for a body that is no form, or has a field twice.
    """
    first = bytes(body[: _MAX_BOUNDARY + 4]).partition(b"\r\n")
    if not first[1] or not first[0].startswith(b"--") or len(first[0]) < 3:
        raise _bad("should be multipart/form-data, beginning with its boundary")
    mark = b"\r\n" + first[0]
    start = len(first[0])
    names: set[str] = set()
    for _ in range(_MAX_PARTS):
        if bytes(body[start : start + 2]) == b"--":
            return
        end = _find(body, mark, start)
        if end < 0:
            raise _bad("breaks off: its last boundary is missing")
        part = _part(body, start, end)
        if part.name in names:
            raise _bad("has a field twice")
        names.add(part.name)
        yield part
        start = end + len(mark)
    raise _bad(f"has more than {_MAX_PARTS} parts")


def _find(body: memoryview, wanted: bytes, start: int) -> int:
    """Return where ``wanted`` begins for the first time from ``start`` on, -1 where it does not come."""
    for at in range(start, len(body), _BLOCK_BYTES):
        place = bytes(body[at : at + _BLOCK_BYTES + len(wanted) - 1]).find(wanted)
        if place >= 0:
            return at + place
    return -1


def _part(body: memoryview, start: int, end: int) -> FormPart:
    head, gap, _ = bytes(body[start : min(end, start + _MAX_HEADERS)]).partition(b"\r\n\r\n")
    if not gap:
        raise _bad("has a part without headers")
    headers = Message()
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip():
            headers[name.strip()] = value.strip()
    name = headers.get_param("name", header="content-disposition")
    if not isinstance(name, str):
        raise _bad("has a part without a name")
    return FormPart(name, headers.get_filename(), body[start + len(head) + len(gap) : end])


def _bad(what: str) -> ServiceError:
    return validation_error([FieldError(BODY, what, "multipart_invalid")])

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


@dataclass(frozen=True, slots=True)
class FormPart:
    """A field of a form; ``filename`` is None where it is no file."""

    name: str
    filename: str | None
    content: bytes


def form_parts(body: bytes) -> Iterator[FormPart]:
    """Give the fields of a form; raises ``ServiceError`` 422 for a body that is none.

    The boundary is the one that the body begins with: forms have nothing before it.
    """
    first = body[: _MAX_BOUNDARY + 4].partition(b"\r\n")
    if not first[1] or not first[0].startswith(b"--") or len(first[0]) < 3:
        raise _bad("should be multipart/form-data, beginning with its boundary")
    mark = b"\r\n" + first[0]
    start = len(first[0])
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", start):
            return
        end = body.find(mark, start)
        if end < 0:
            raise _bad("breaks off: its last boundary is missing")
        yield _part(body, start, end)
        start = end + len(mark)
    raise _bad(f"has more than {_MAX_PARTS} parts")


def _part(body: bytes, start: int, end: int) -> FormPart:
    gap = body.find(b"\r\n\r\n", start, min(end, start + _MAX_HEADERS))
    if gap < 0:
        raise _bad("has a part without headers")
    headers = Message()
    for line in body[start:gap].decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip():
            headers[name.strip()] = value.strip()
    name = headers.get_param("name", header="content-disposition")
    if not isinstance(name, str):
        raise _bad("has a part without a name")
    return FormPart(name, headers.get_filename(), body[gap + 4 : end])


def _bad(what: str) -> ServiceError:
    return validation_error([FieldError(BODY, what, "multipart_invalid")])

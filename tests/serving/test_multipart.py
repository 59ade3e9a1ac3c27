"""Forms are read as an independent reader reads them, wherever their boundaries lie."""

from __future__ import annotations

import email.parser
import email.policy

import pytest

from services.core.errors import ServiceError
from services.core.serving import multipart
from services.core.serving.multipart import form_parts

HEAD = b"--b\r\nContent-Disposition: form-data; name="


def form(*contents: bytes) -> bytes:
    parts = (HEAD + b'"n%d"\r\n\r\n%b\r\n' % (number, each) for number, each in enumerate(contents))
    return b"".join(parts) + b"--b--\r\n"


def fields(body: bytes) -> dict[str, bytes]:
    return {part.name: bytes(part.content) for part in form_parts(memoryview(body))}


def by_email(body: bytes) -> dict[str, bytes]:
    whole = b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + body
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(whole)
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)  # type: ignore[misc]
        for part in message.iter_parts()  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("shift", range(-8, 9))
def test_a_boundary_may_lie_between_two_blocks(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    monkeypatch.setattr(multipart, "_BLOCK_BYTES", 64)
    body = form(b"x" * (64 + shift), b"-" * 200, b"\r\n-" * 50 + b"\r\n--", b"")
    assert fields(body) == by_email(body)
    assert len(fields(body)) == 4


def test_contents_are_no_copies() -> None:
    body = form(b"x" * 1000)
    (part,) = form_parts(memoryview(body))
    assert part.content.obj is body


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "beginning with its boundary"),
        (form(b"x")[:-9], "breaks off"),
        (HEAD + b"n\r\n--b--", "without headers"),
        (b"--b\r\nA: b\r\n\r\nx\r\n--b--", "without a name"),
        (form(b"x", b"y").replace(b"n1", b"n0"), "twice"),
        (form(*[b"x"] * 33), "more than 32 parts"),
    ],
)
def test_what_is_no_form_is_refused_in_words(body: bytes, why: str) -> None:
    with pytest.raises(ServiceError, match=why):
        list(form_parts(memoryview(body)))

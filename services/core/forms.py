"""Errors in the forms of other vendors: one table, for those that services make and those of the gateway.

A form adds to our own body what its vendor's clients read; where a name is taken by both, it is the vendor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from services.core.errors import ERRORS, ErrorCode, error_body


@dataclass(frozen=True, slots=True)
class Form:
    """How errors look under the paths of one vendor.

    The names of rpcs in the contract begin with ``name``. ``paths`` is a regular expression that all of
    their paths match, and paths of this vendor that are not served; ``fields`` makes what its clients read
    of code, HTTP status and sentence.
    """

    name: str
    paths: str
    fields: Callable[[ErrorCode, int, str], dict[str, Any]]


def _cohere(code: ErrorCode, status: int, detail: str) -> dict[str, Any]:
    return {"message": detail}


_TEI_KINDS = {
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Validation",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Validation",
    HTTPStatus.BAD_REQUEST: "Validation",
    HTTPStatus.TOO_MANY_REQUESTS: "Overloaded",
    HTTPStatus.SERVICE_UNAVAILABLE: "Overloaded",
}


def _tei(code: ErrorCode, status: int, detail: str) -> dict[str, Any]:
    return {"error": detail, "error_type": _TEI_KINDS.get(HTTPStatus(status), "Backend")}


def _gemini(code: ErrorCode, status: int, detail: str) -> dict[str, Any]:
    kind = "NOT_FOUND" if status == HTTPStatus.NOT_FOUND else ERRORS[code].grpc_status.name
    return {"error": {"code": status, "message": detail, "status": kind}}


def _ollama(code: ErrorCode, status: int, detail: str) -> dict[str, Any]:
    return {"error": detail}


FORMS = (
    Form("Cohere", r"/cohere/.*|/v2/.*|/v1/embed", _cohere),
    Form("Tei", r"/(|embed|embed_all|embed_sparse|rerank|similarity|info|predict|tokenize|decode)", _tei),
    Form("Gemini", r"/v1beta/.*|/v1/models/.*:[a-zA-Z]+", _gemini),
    Form("Ollama", r"/api/.*", _ollama),
)


def form_of(rpc: str) -> Form | None:
    """The form of a method's errors, None for our own."""
    return next((form for form in FORMS if rpc.startswith(form.name)), None)


def formed_body(
    form: Form | None,
    code: ErrorCode,
    detail: str,
    request_id: str,
    *,
    status: int | None = None,
    param: str | None = None,
) -> dict[str, Any]:
    """Lay out the body of an error as ``error_body`` does, in ``form``."""
    body = error_body(code, detail, request_id, status=status, param=param)
    if form is not None:
        body |= form.fields(code, status or ERRORS[code].http_status, detail)
    return body

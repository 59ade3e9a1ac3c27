"""Pieces that the chapters of all capabilities are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from services.core.errors import ERRORS, ErrorCode
from services.core.openapi.errors import ErrorResponse, HTTPValidationError

Document = dict[str, Any]

JSON = "application/json"
REF = "#/components/schemas/"
SECURITY = [{"HTTPBearer": []}]
_TEXT: Document = {"type": "string"}

CALL_ERRORS = (
    ErrorCode.AUTH_MISSING_API_KEY,
    ErrorCode.AUTH_INVALID_API_KEY,
    ErrorCode.AUTH_INVALID_FORMAT,
    ErrorCode.AUTHZ_INSUFFICIENT_BALANCE,
    ErrorCode.VALIDATION_ERROR,
    ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED,
    ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED,
    ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED,
    ErrorCode.RATE_IP_LIMIT_EXCEEDED,
    ErrorCode.INTERNAL_ERROR,
    ErrorCode.SERVICE_UNAVAILABLE,
    ErrorCode.SERVICE_TIMEOUT,
)
"""What any call with a key may end with."""

MODEL_ERRORS = (
    ErrorCode.INPUT_MODEL_NOT_FOUND,
    ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED,
    ErrorCode.INPUT_INVALID,
    ErrorCode.INPUT_TOO_LARGE,
    *CALL_ERRORS,
)
"""What a call of a model may end with."""

_RETRIED = (HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Operation:
    """A POST whose body is one of several schemas, told apart by ``model``, or ``other``, which has none."""

    path: str
    name: str
    tag: str
    summary: str
    description: str
    title: str
    requests: Mapping[str, type[BaseModel]]
    answer: type[BaseModel]
    answered: str
    other: type[BaseModel] | None = None
    errors: Sequence[ErrorCode] = ()

    def schemas(self) -> Iterator[type[BaseModel]]:
        """All that a body may be."""
        yield from self.requests.values()
        if self.other is not None:
            yield self.other

    def described(self) -> Document:
        """The operation as the document has it."""
        return {
            "tags": [self.tag],
            "summary": self.summary,
            "description": self.description,
            "operationId": self.name,
            "security": SECURITY,
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": {"title": self.title, **self._body()}}},
            },
            "responses": {
                "200": answer(self.answered, self.answer, headers=LIMIT_HEADERS | _TIME_HEADER),
                **errors((*MODEL_ERRORS, *self.errors)),
            },
        }

    def _body(self) -> Document:
        refs = {model: f"{REF}{schema.__name__}" for model, schema in self.requests.items()}
        by_model: Document = {
            "oneOf": [{"$ref": ref} for ref in refs.values()],
            "discriminator": {"propertyName": "model", "mapping": refs},
        }
        if self.other is None:
            return by_model
        other = {"$ref": f"{REF}{self.other.__name__}"}
        return {"anyOf": [by_model, other] if refs else [other]}


@dataclass(frozen=True, slots=True)
class Chapter:
    """A part of the document: POSTs of models, further paths, and what those take and answer with.

    ``tags`` are the headings that its operations stand under, each with a sentence.
    """

    tags: Mapping[str, str]
    operations: tuple[Operation, ...] = ()
    paths: Document = field(default_factory=dict[str, Any])
    answers: tuple[type[BaseModel], ...] = ()
    bodies: tuple[type[BaseModel], ...] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the services take in one call, as their settings of the same names say."""

    items: int = 2048
    documents: int = 2048
    classify_items: int = 512
    answer_tokens: int = 8192


def call(
    tag: str,
    summary: str,
    name: str,
    answered: Document,
    parameters: Sequence[Document] = (),
    further_errors: Iterable[ErrorCode] = (),
) -> Document:
    """An operation with a key and without a body; ``answered`` is its 200."""
    described: Document = {"tags": [tag], "summary": summary, "operationId": name, "security": SECURITY}
    if parameters:
        described["parameters"] = list(parameters)
    described["responses"] = {"200": answered, **errors((*CALL_ERRORS, *further_errors))}
    return described


def answer(description: str, model: type[BaseModel], headers: Document | None = None) -> Document:
    """A JSON answer."""
    described: Document = {
        "description": description,
        "content": {JSON: {"schema": {"$ref": f"{REF}{model.__name__}"}}},
    }
    return described | {"headers": headers} if headers else described


def list_answer(description: str, model: type[BaseModel], headers: Document) -> Document:
    """An answer that is a JSON array."""
    described = answer(description, model, headers)
    content = described["content"][JSON]
    content["schema"] = {"type": "array", "items": content["schema"]}
    return described


def errors(codes: Iterable[ErrorCode]) -> Document:
    """Answers by status, the lowest first. Braces in the texts stand for what a request fills in."""
    texts: dict[int, list[str]] = {}
    for code in codes:
        spec = ERRORS[code]
        texts.setdefault(spec.http_status, []).append(f"- **{code}**: {spec.template}")
    return {str(status): _error(status, "\n".join(texts[status])) for status in sorted(texts)}


def path_parameter(name: str, description: str) -> Document:
    """A text in the path."""
    return {"name": name, "in": "path", "required": True, "description": description, "schema": _TEXT}


def header_parameter(name: str, description: str) -> Document:
    """A header of the request."""
    return {"name": name, "in": "header", "description": description, "schema": _TEXT}


def query_parameter(name: str, schema: Document, description: str = "") -> Document:
    """A parameter behind the path; ``description`` is for those whose name and schema do not tell all."""
    parameter: Document = {"name": name, "in": "query", "schema": schema}
    return parameter | {"description": description} if description else parameter


def _error(status: int, description: str) -> Document:
    body = HTTPValidationError if status == HTTPStatus.UNPROCESSABLE_ENTITY else ErrorResponse
    return answer(description, body, headers=_RETRY_HEADER if status in _RETRIED else None)


def _header(description: str, kind: str) -> Document:
    return {"description": description, "schema": {"type": kind}}


LIMIT_HEADERS = {
    "X-Request-Id": _header("Names this request in the server's logs.", "string"),
    "X-RateLimit-Remaining-Requests": _header(
        "Requests left in this minute; 2147483647 without a limit.", "integer"
    ),
    "X-RateLimit-Remaining-Tokens": _header(
        "Tokens left in this minute; 2147483647 without a limit.", "integer"
    ),
}
_TIME_HEADER = {
    "Server-Timing": _header(
        "Milliseconds of tokenize, queue and inference; with media of fetch and decode too.", "string"
    )
}
_RETRY_HEADER = {"Retry-After": _header("Seconds to wait before trying again.", "integer")}

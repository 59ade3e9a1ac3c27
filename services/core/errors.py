"""The one table of errors: every failure a caller can see is a row here.

The REST side renders ``{detail, code, request_id, error}`` (422 adds ``errors``), the gRPC side the
status code with ``google.rpc`` details. Codes and texts follow the Search Foundation API; ``error`` is what
OpenAI's SDKs look for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc

from services.core.preview import clip, preview


class ErrorCode(StrEnum):
    """Machine-readable error codes, as they stand in the ``code`` field of a body."""

    INPUT_MODEL_NOT_FOUND = "INPUT_MODEL_NOT_FOUND"
    INPUT_INVALID_LABELS = "INPUT_INVALID_LABELS"
    INPUT_LABEL_LIMIT_EXCEEDED = "INPUT_LABEL_LIMIT_EXCEEDED"
    INPUT_TOKEN_LIMIT_EXCEEDED = "INPUT_TOKEN_LIMIT_EXCEEDED"
    INPUT_INVALID = "INPUT_INVALID"
    INPUT_TOO_LARGE = "INPUT_TOO_LARGE"
    UNSUPPORTED_CONTENT_ENCODING = "UNSUPPORTED_CONTENT_ENCODING"
    AUTH_MISSING_API_KEY = "AUTH_MISSING_API_KEY"
    AUTH_INVALID_API_KEY = "AUTH_INVALID_API_KEY"
    AUTH_INVALID_FORMAT = "AUTH_INVALID_FORMAT"
    AUTHZ_INSUFFICIENT_BALANCE = "AUTHZ_INSUFFICIENT_BALANCE"
    AUTHZ_RESOURCE_LIMIT_EXCEEDED = "AUTHZ_RESOURCE_LIMIT_EXCEEDED"
    RESOURCE_NOT_FOUND = "RESOURCE_NOT_FOUND"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    PRECONDITION_FAILED = "PRECONDITION_FAILED"
    RANGE_NOT_SATISFIABLE = "RANGE_NOT_SATISFIABLE"
    CONFLICT_RESOURCE_BUSY = "CONFLICT_RESOURCE_BUSY"
    CONFLICT_STATE = "CONFLICT_STATE"
    RATE_REQUEST_LIMIT_EXCEEDED = "RATE_REQUEST_LIMIT_EXCEEDED"
    RATE_TOKEN_LIMIT_EXCEEDED = "RATE_TOKEN_LIMIT_EXCEEDED"
    RATE_CONCURRENCY_LIMIT_EXCEEDED = "RATE_CONCURRENCY_LIMIT_EXCEEDED"
    RATE_IP_LIMIT_EXCEEDED = "RATE_IP_LIMIT_EXCEEDED"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    SERVICE_UNAVAILABLE = "SERVICE_UNAVAILABLE"
    STORAGE_FULL = "STORAGE_FULL"
    SERVICE_TIMEOUT = "SERVICE_TIMEOUT"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """How one code looks on both wires; ``template`` is a ``str.format`` text."""

    http_status: int
    grpc_status: grpc.StatusCode
    template: str


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
"""``type`` of OpenAI's errors by HTTP status; all others are ``invalid_request_error``."""

_ALIASES = {
    ErrorCode.INPUT_MODEL_NOT_FOUND: "model_not_found",
    ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED: "context_length_exceeded",
    ErrorCode.AUTH_MISSING_API_KEY: "invalid_api_key",
    ErrorCode.AUTH_INVALID_API_KEY: "invalid_api_key",
    ErrorCode.AUTH_INVALID_FORMAT: "invalid_api_key",
    ErrorCode.AUTHZ_INSUFFICIENT_BALANCE: "insufficient_quota",
    ErrorCode.ROUTE_NOT_FOUND: "unknown_url",
    ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED: "rate_limit_exceeded",
    ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED: "rate_limit_exceeded",
    ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED: "rate_limit_exceeded",
    ErrorCode.RATE_IP_LIMIT_EXCEEDED: "rate_limit_exceeded",
}
"""``code`` of OpenAI's errors, where programs look for one; all others are ours in small letters."""

_PARAMS = {ErrorCode.INPUT_MODEL_NOT_FOUND: "model", ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED: "input"}

_KEYS_HELP = "Create one with 'search-foundation keys create'."

ERRORS: dict[ErrorCode, ErrorSpec] = {
    ErrorCode.INPUT_MODEL_NOT_FOUND: ErrorSpec(
        400,
        grpc.StatusCode.INVALID_ARGUMENT,
        "Model '{model}' not found. Available models: {available}.",
    ),
    ErrorCode.INPUT_INVALID_LABELS: ErrorSpec(
        400,
        grpc.StatusCode.INVALID_ARGUMENT,
        "Invalid training labels. At least {min_labels} unique labels are required for training.",
    ),
    ErrorCode.INPUT_LABEL_LIMIT_EXCEEDED: ErrorSpec(
        400,
        grpc.StatusCode.INVALID_ARGUMENT,
        "Label limit exceeded: {current} labels provided, maximum {limit} allowed for your plan. "
        "Reduce the number of labels or upgrade your plan.",
    ),
    ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED: ErrorSpec(
        400,
        grpc.StatusCode.INVALID_ARGUMENT,
        "Input text exceeds the model's maximum of {limit} tokens. "
        "Use 'truncate: true' to cut it, or send a shorter text.",
    ),
    ErrorCode.INPUT_INVALID: ErrorSpec(400, grpc.StatusCode.INVALID_ARGUMENT, "{reason}"),
    ErrorCode.INPUT_TOO_LARGE: ErrorSpec(
        413, grpc.StatusCode.RESOURCE_EXHAUSTED, "Request body exceeds the maximum of {limit} bytes."
    ),
    ErrorCode.UNSUPPORTED_CONTENT_ENCODING: ErrorSpec(
        415,
        grpc.StatusCode.INVALID_ARGUMENT,
        "This Content-Encoding of a body is not unpacked here. Send it as it is, or as one of {codings}.",
    ),
    ErrorCode.AUTH_MISSING_API_KEY: ErrorSpec(
        401,
        grpc.StatusCode.UNAUTHENTICATED,
        "Authentication required. Provide your API key via the Authorization header: "
        f"'Authorization: Bearer <api-key>'. {_KEYS_HELP}",
    ),
    ErrorCode.AUTH_INVALID_API_KEY: ErrorSpec(
        401, grpc.StatusCode.UNAUTHENTICATED, f"Invalid API key. Verify your API key. {_KEYS_HELP}"
    ),
    ErrorCode.AUTH_INVALID_FORMAT: ErrorSpec(
        401,
        grpc.StatusCode.UNAUTHENTICATED,
        "Invalid authorization format. Use 'Authorization: Bearer <api-key>' with a valid API key "
        "(65 characters, starts with 'jina_').",
    ),
    ErrorCode.AUTHZ_INSUFFICIENT_BALANCE: ErrorSpec(
        403, grpc.StatusCode.PERMISSION_DENIED, "Insufficient account balance. Top up your account."
    ),
    ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED: ErrorSpec(
        403,
        grpc.StatusCode.PERMISSION_DENIED,
        "Resource limit exceeded for your plan. Current: {current}, limit: {limit}. "
        "Delete existing resources or upgrade your plan.",
    ),
    ErrorCode.RESOURCE_NOT_FOUND: ErrorSpec(
        404,
        grpc.StatusCode.NOT_FOUND,
        "{resource_type} '{resource_id}' not found or access denied. Verify the ID and your permissions.",
    ),
    ErrorCode.ROUTE_NOT_FOUND: ErrorSpec(404, grpc.StatusCode.UNIMPLEMENTED, "No such path."),
    ErrorCode.METHOD_NOT_ALLOWED: ErrorSpec(
        405, grpc.StatusCode.UNIMPLEMENTED, "This path does not take this HTTP method."
    ),
    ErrorCode.REQUEST_TIMEOUT: ErrorSpec(
        408,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "The request did not arrive completely within {timeout_seconds:g} seconds.",
    ),
    ErrorCode.VALIDATION_ERROR: ErrorSpec(422, grpc.StatusCode.INVALID_ARGUMENT, "{reason}"),
    ErrorCode.PRECONDITION_FAILED: ErrorSpec(
        412,
        grpc.StatusCode.FAILED_PRECONDITION,
        "The file is not the one that If-Match names.",
    ),
    ErrorCode.RANGE_NOT_SATISFIABLE: ErrorSpec(
        416,
        grpc.StatusCode.OUT_OF_RANGE,
        "The range begins behind the end of the file, which has {length} bytes.",
    ),
    ErrorCode.CONFLICT_RESOURCE_BUSY: ErrorSpec(
        409,
        grpc.StatusCode.ABORTED,
        "{resource_type} '{resource_id}' is currently being modified. Please retry after a few moments.",
    ),
    ErrorCode.CONFLICT_STATE: ErrorSpec(409, grpc.StatusCode.FAILED_PRECONDITION, "{reason}"),
    ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED: ErrorSpec(
        429,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "Request rate limit exceeded: {current}/{limit} requests per minute. "
        "Reduce request frequency or upgrade your plan.",
    ),
    ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED: ErrorSpec(
        429,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "Token rate limit exceeded: {current:,}/{limit:,} tokens per minute. "
        "Reduce batch sizes or upgrade your plan.",
    ),
    ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED: ErrorSpec(
        429,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "Concurrency limit exceeded: {current}/{limit} concurrent requests. "
        "Wait for pending requests to complete before sending new ones.",
    ),
    ErrorCode.RATE_IP_LIMIT_EXCEEDED: ErrorSpec(
        429,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "IP rate limit exceeded. Too many requests from this IP address. Reduce request frequency.",
    ),
    ErrorCode.INTERNAL_ERROR: ErrorSpec(
        500,
        grpc.StatusCode.INTERNAL,
        "An unexpected error occurred. "
        "If this persists, contact support with the request_id from this response.",
    ),
    ErrorCode.SERVICE_UNAVAILABLE: ErrorSpec(
        503,
        grpc.StatusCode.UNAVAILABLE,
        "Service temporarily unavailable. Please retry with exponential backoff.",
    ),
    ErrorCode.STORAGE_FULL: ErrorSpec(
        507,
        grpc.StatusCode.UNAVAILABLE,
        "The server's disk is nearly full, so it takes no new {what}. "
        "What is there can be read, cancelled and deleted; retry when there is room again.",
    ),
    ErrorCode.SERVICE_TIMEOUT: ErrorSpec(
        504,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "Request timed out after {timeout_seconds:g} seconds. Try with smaller inputs or retry later.",
    ),
}


_FIELD_BYTES = 256
_MESSAGE_BYTES = 512
_TYPE_BYTES = 64
_DETAIL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class FieldError:
    """One entry of a 422 body's ``errors``: ``field`` joins the location with `` -> ``.

    Of ``input`` only a preview is kept, and the texts are cut: an error outlives its request.
    """

    field: str
    message: str
    type: str
    input: Any = None

    def __post_init__(self) -> None:
        """Cut what a caller may have made long."""
        object.__setattr__(self, "field", clip(self.field, _FIELD_BYTES))
        object.__setattr__(self, "message", clip(self.message, _MESSAGE_BYTES))
        object.__setattr__(self, "type", clip(self.type, _TYPE_BYTES))
        object.__setattr__(self, "input", preview(self.input))

    @property
    def param(self) -> str | None:
        """Name of the field alone, without what leads to it; None where the body as a whole is meant."""
        return next((part for part in self.field.split(" -> ")[1:] if part.isidentifier()), None)


class ServiceError(Exception):
    """A failure the caller is told about.

    ``fields`` fill the code's message template, unless there are ``words`` instead. ``retry_after`` is in
    seconds and becomes the ``Retry-After`` header; ``field_errors`` the ``errors`` of a 422 body;
    ``headers`` (lower-case names) go with the answer on both wires.
    """

    def __init__(
        self,
        code: ErrorCode,
        *,
        retry_after: float | None = None,
        field_errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        words: str | None = None,
        **fields: Any,
    ) -> None:
        self.code = code
        self.spec = ERRORS[code]
        text = self.spec.template.format(**fields) if words is None else words
        self.detail = clip(text, _DETAIL_BYTES)
        self.retry_after = retry_after
        self.field_errors = tuple(field_errors)
        self.headers: Mapping[str, str] = headers or {}
        super().__init__(self.detail)


def media_too_long(name: str, tokens: int, limit: int) -> ServiceError:
    """Build the refusal of an input with media, which is never cut; ``name`` as in ``input 3``."""
    words = (
        f"{name[:1].upper()}{name[1:]} has {tokens} tokens, the model takes at most {limit}. "
        "Media are never cut: send fewer, smaller or shorter ones."
    )
    return ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, words=words)


def error_body(
    code: ErrorCode, detail: str, request_id: str, *, status: int | None = None, param: str | None = None
) -> dict[str, Any]:
    """Lay out the body of an error, whoever makes it; ``status`` where it is not that of the code."""
    kind = _TYPES.get(status or ERRORS[code].http_status, "invalid_request_error")
    return {
        "detail": detail,
        "code": code.value,
        "request_id": request_id,
        "error": {
            "message": detail,
            "type": kind,
            "param": param or _PARAMS.get(code),
            "code": _ALIASES.get(code, code.value.lower()),
        },
    }


def validation_error(field_errors: Sequence[FieldError]) -> ServiceError:
    """Build the 422 of one or several bad fields, worded as the hosted API words it."""
    if len(field_errors) == 1:
        reason = f"Validation error: '{field_errors[0].field}' {field_errors[0].message}"
    else:
        fields = "; ".join(f"{e.field}: {e.message}" for e in field_errors[:20])
        reason = f"Validation errors in {len(field_errors)} fields: {fields}"
    return ServiceError(ErrorCode.VALIDATION_ERROR, field_errors=field_errors, reason=reason)

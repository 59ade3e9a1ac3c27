"""The gateway's own answers, in the same shape and words as those of the services."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from gateway.call_kind import is_grpc
from gateway.topology import Topology
from services.core.errors import ERRORS, ErrorCode

Config = dict[str, Any]

RETRY_AFTER_SECONDS = 1
METADATA_NAMESPACE = "searchfoundation"
UNKNOWN_MODEL = "unknown_model"
VERBATIM = "verbatim"

_JSON = "application/json"
_INVALID_HTTP = "The request is not valid HTTP."
_TOO_LARGE_HEADERS = "Request headers exceed the maximum of {limit} KiB."


@dataclass(frozen=True, slots=True)
class Reply:
    """One error answer: ``{detail, code, request_id}`` under an HTTP status."""

    status: int
    code: ErrorCode
    detail: str


def error_reply(code: ErrorCode, **fields: Any) -> Reply:
    """Fill the template of a code."""
    spec = ERRORS[code]
    return Reply(spec.http_status, code, spec.template.format(**fields))


def local_replies(topology: Topology) -> Config:
    """Envoy's ``local_reply_config``: what it says itself, first match wins."""
    limits, timeouts = topology.limits, topology.timeouts
    unavailable = error_reply(ErrorCode.SERVICE_UNAVAILABLE)
    model = error_reply(
        ErrorCode.RESOURCE_NOT_FOUND,
        resource_type="Model",
        resource_id=f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{UNKNOWN_MODEL})%",
    )
    mappers = [
        *_grpc_mappers(),
        {"filter": _has_metadata(VERBATIM), "body_format_override": _as_it_is(content_type=_JSON)},
        _mapper(_both(_status_is(404), _has_metadata(UNKNOWN_MODEL)), model),
        _mapper(_status_is(404), error_reply(ErrorCode.ROUTE_NOT_FOUND)),
        _mapper(_status_is(405), error_reply(ErrorCode.METHOD_NOT_ALLOWED)),
        _mapper(_status_is(408), error_reply(ErrorCode.REQUEST_TIMEOUT, timeout_seconds=timeouts.receive)),
        _mapper(_status_is(413), error_reply(ErrorCode.INPUT_TOO_LARGE, limit=limits.max_body_bytes)),
        _mapper(
            _status_is(431),
            Reply(431, ErrorCode.INPUT_TOO_LARGE, _TOO_LARGE_HEADERS.format(limit=limits.max_header_kib)),
        ),
        _mapper(_status_is(502), unavailable, retry_after=True),
        _mapper(_status_is(503), unavailable, retry_after=True),
        _mapper(_status_is(504), error_reply(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=timeouts.request)),
        _mapper(_status_from(500), error_reply(ErrorCode.INTERNAL_ERROR)),
        _mapper(_status_from(400), error_reply(ErrorCode.INPUT_INVALID, reason=_INVALID_HTTP), keep=True),
    ]
    return {"mappers": mappers}


def grpc_replies() -> Config:
    """``local_reply_config`` of the listener for gRPC alone."""
    return {"mappers": _grpc_mappers()}


def _grpc_mappers() -> list[Config]:
    # Envoy turns its own replies to gRPC callers into a gRPC status with the text as message.
    retry: Config = {"filter": _both(is_grpc(), _status_is(503)), "body_format_override": _as_it_is()}
    retry["headers_to_add"] = [_retry_after()]
    return [retry, {"filter": is_grpc(), "body_format_override": _as_it_is()}]


def _as_it_is(**fields: str) -> Config:
    return {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}, **fields}


def status_table(topology: Topology) -> dict[int, Reply]:
    """What a gRPC status becomes when the service did not say how it looks over HTTP."""
    codes: dict[grpc.StatusCode, Reply] = {
        grpc.StatusCode.CANCELLED: error_reply(ErrorCode.SERVICE_UNAVAILABLE),
        grpc.StatusCode.INVALID_ARGUMENT: error_reply(
            ErrorCode.INPUT_INVALID, reason="The service refused the request as invalid."
        ),
        grpc.StatusCode.DEADLINE_EXCEEDED: error_reply(
            ErrorCode.SERVICE_TIMEOUT, timeout_seconds=topology.timeouts.request
        ),
        grpc.StatusCode.NOT_FOUND: error_reply(ErrorCode.ROUTE_NOT_FOUND),
        grpc.StatusCode.UNIMPLEMENTED: error_reply(ErrorCode.ROUTE_NOT_FOUND),
        grpc.StatusCode.UNAUTHENTICATED: error_reply(ErrorCode.AUTH_INVALID_API_KEY),
        grpc.StatusCode.PERMISSION_DENIED: Reply(
            403, ErrorCode.AUTHZ_INSUFFICIENT_BALANCE, "The key may not do this."
        ),
        # gRPC's own use of this status is a message above the server's size limit.
        grpc.StatusCode.RESOURCE_EXHAUSTED: error_reply(
            ErrorCode.INPUT_TOO_LARGE, limit=topology.limits.max_body_bytes
        ),
        grpc.StatusCode.UNAVAILABLE: error_reply(ErrorCode.SERVICE_UNAVAILABLE),
    }
    internal = error_reply(ErrorCode.INTERNAL_ERROR)
    numbers: dict[grpc.StatusCode, int] = {status: status.value[0] for status in grpc.StatusCode}
    return {number: codes.get(status, internal) for status, number in numbers.items() if number}


def body_format(reply: Reply) -> Config:
    """Envoy's format of an error body; ``%...%`` in the detail is filled in by Envoy."""
    return {
        "json_format": {"detail": reply.detail, "code": str(reply.code), "request_id": "%REQ(X-REQUEST-ID)%"},
        "content_type": _JSON,
    }


def _mapper(matches: Config, reply: Reply, *, retry_after: bool = False, keep: bool = False) -> Config:
    mapper: Config = {"filter": matches, "body_format_override": body_format(reply)}
    if not keep:
        mapper["status_code"] = reply.status
    if retry_after:
        mapper["headers_to_add"] = [_retry_after()]
    return mapper


def _retry_after() -> Config:
    return {
        "header": {"key": "retry-after", "value": str(RETRY_AFTER_SECONDS)},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _status_is(status: int) -> Config:
    return _status("EQ", status)


def _status_from(status: int) -> Config:
    return _status("GE", status)


def _status(operator: str, status: int) -> Config:
    value = {"default_value": status, "runtime_key": f"searchfoundation.reply_{status}"}
    return {"status_code_filter": {"comparison": {"op": operator, "value": value}}}


def _has_metadata(key: str) -> Config:
    matcher = {"filter": METADATA_NAMESPACE, "path": [{"key": key}], "value": {"present_match": True}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": False}}


def _both(one: Config, other: Config) -> Config:
    return {"and_filter": {"filters": [one, other]}}

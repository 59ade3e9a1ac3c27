"""The gateway's own answers, in the same shape and words as those of the services."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc

from gateway.call_kind import has_path, is_grpc, is_true, is_unread
from gateway.topology import Topology
from gateway.unpacking import CODINGS
from services.core.errors import ERRORS, ErrorCode
from services.core.forms import FORMS, Form, formed_body

Config = dict[str, Any]

RETRY_AFTER_SECONDS = 1
METADATA_NAMESPACE = "searchfoundation"
LARGEST_BODY = "max_body_bytes"
"""Metadata of a route: the largest body that its calls may have, in bytes."""
UNKNOWN_MODEL = "unknown_model"
VERBATIM = "verbatim"
UNREAD_REQUEST_ID = "%CONNECTION_ID%-%START_TIME(%s%9f)%"
"""Id of a request answered before the Lua filter could give it one: the same wherever it is written."""

_JSON = "application/json"
_LARGEST = f"%METADATA(ROUTE:{METADATA_NAMESPACE}:{LARGEST_BODY})%"
_INVALID_HTTP = "The request is not valid HTTP."
_UPGRADE = "No connection is upgraded to another protocol here."
_TOO_LARGE_HEADERS = "Request headers exceed the maximum of {kib} KiB."
_TOO_MANY_HEADERS = "The request has more than {headers} headers."
_NOT_HTTP = {
    "missing_host_header": "The request has no Host header.",
    "path_normalization_failed": "The path of the request is not one.",
    "http1.invalid_url": "The path of the request is not one.",
    "http1.invalid_scheme": "The URL of the request has a scheme other than http and https.",
    "http1.invalid_characters": "A header of the request holds a character that none may have.",
    "http1.invalid_transfer_encoding": "The request has a Transfer-Encoding other than 'chunked'.",
    "http1.content_length_and_chunked_not_allowed": "The request has Content-Length and Transfer-Encoding.",
    "invalid_authority": "The Host header of the request is not a host.",
    "http1.codec_error": "The request is not valid HTTP: its method, length or a header could not be read.",
}
"""What is wrong, by what Envoy says of it in ``response.code_details``."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One error answer under an HTTP status."""

    status: int
    code: ErrorCode
    detail: str

    def body(self, request_id: str, form: Form | None = None) -> dict[str, Any]:
        """Lay out its JSON, in the form of another vendor if one is given."""
        return formed_body(form, self.code, self.detail, request_id, status=self.status)


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
    replies = [
        (_both(_status_is(404), _has_metadata(UNKNOWN_MODEL)), model),
        (_status_is(404), error_reply(ErrorCode.ROUTE_NOT_FOUND)),
        (_status_is(405), error_reply(ErrorCode.METHOD_NOT_ALLOWED)),
        (_status_is(408), error_reply(ErrorCode.REQUEST_TIMEOUT, timeout_seconds=timeouts.receive)),
        (_status_is(413), error_reply(ErrorCode.INPUT_TOO_LARGE, limit=_LARGEST)),
        (
            _status_is(415),
            error_reply(ErrorCode.UNSUPPORTED_CONTENT_ENCODING, codings=", ".join(CODINGS)),
        ),
        (_because("too_many_headers"), _headers(_TOO_MANY_HEADERS.format(headers=limits.max_headers))),
        (_status_is(431), _headers(_TOO_LARGE_HEADERS.format(kib=limits.max_header_kib))),
        (_status_is(502), unavailable),
        (_status_is(503), unavailable),
        (_status_is(504), error_reply(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=timeouts.request)),
        *(
            (_because(why), error_reply(ErrorCode.INPUT_INVALID, reason=text))
            for why, text in _NOT_HTTP.items()
        ),
        (_status_from(500), error_reply(ErrorCode.INTERNAL_ERROR)),
        (_status_is(403), error_reply(ErrorCode.INPUT_INVALID, reason=_UPGRADE)),
        (_status_from(400), error_reply(ErrorCode.INPUT_INVALID, reason=_INVALID_HTTP)),
    ]
    return {
        "mappers": [
            *_grpc_mappers(),
            {"filter": _has_metadata(VERBATIM), "body_format_override": _as_it_is(content_type=_JSON)},
            # Of these nobody knows whose path it is.
            *(_mapper(_both(is_unread(), matches), reply, unread=True) for matches, reply in replies),
            *(
                _mapper(_both(has_path(form.paths), matches), reply, form)
                for form in FORMS
                for matches, reply in replies
            ),
            *(_mapper(matches, reply) for matches, reply in replies),
        ]
    }


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


def body_format(reply: Reply, request_id: str, form: Form | None = None) -> Config:
    """Envoy's format of an error body; ``%...%`` in the texts is filled in by Envoy."""
    return {
        "json_format": reply.body(request_id, form),
        "content_type": _JSON,
    }


def _mapper(matches: Config, reply: Reply, form: Form | None = None, *, unread: bool = False) -> Config:
    request_id = UNREAD_REQUEST_ID if unread else "%REQ(X-REQUEST-ID)%"
    headers = [_header("x-request-id", request_id)] if unread else []
    if reply.status == 415:
        headers.append(_header("accept-encoding", ", ".join(CODINGS)))
    if reply.status in (502, 503):
        headers.append(_retry_after())
    return {
        "filter": matches,
        "status_code": reply.status,
        "body_format_override": body_format(reply, request_id, form),
        **({"headers_to_add": headers} if headers else {}),
    }


def _headers(detail: str) -> Reply:
    return Reply(431, ErrorCode.INPUT_TOO_LARGE, detail)


def _retry_after() -> Config:
    return _header("retry-after", str(RETRY_AFTER_SECONDS))


def _header(key: str, value: str) -> Config:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _because(details: str) -> Config:
    """Match what Envoy answers for a reason: its whole name, or what follows the name of the codec."""
    return is_true(f"response.code_details.endsWith({json.dumps(details)})")


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

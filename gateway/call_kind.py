"""Telling kinds of calls apart in the filters that Envoy's logs and local replies have."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# The transcoder has made a gRPC call of a REST call, too, and left the original path behind.
_ORIGINAL_PATH = "x-envoy-original-path"
_REQUEST_ID = "x-request-id"
_CEL = "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"


def is_unread() -> Config:
    """Requests that were answered before they had an id, by the HTTP codec for example."""
    return _header({"name": _REQUEST_ID, "present_match": False})


def is_grpc() -> Config:
    """Calls that came as gRPC."""
    return {
        "and_filter": {"filters": [_content(), _header({"name": _ORIGINAL_PATH, "present_match": False})]}
    }


def is_rest() -> Config:
    """All others that have an id."""
    original = _header({"name": _ORIGINAL_PATH, "present_match": True})
    other = {"or_filter": {"filters": [_content(invert_match=True), original]}}
    return {"and_filter": {"filters": [_header({"name": _REQUEST_ID, "present_match": True}), other]}}


def has_path(pattern: str) -> Config:
    """Calls that came to a path, whatever its query and a slash at its end."""
    whole = {"safe_regex": {"regex": f"({pattern})/?(\\?.*)?"}}
    names = (_ORIGINAL_PATH, ":path")
    return {"or_filter": {"filters": [_header({"name": name, "string_match": whole}) for name in names]}}


def is_true(expression: str) -> Config:
    """Calls of which an expression of CEL holds."""
    config = {"@type": f"type.googleapis.com/{_CEL}", "expression": expression}
    return {
        "extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": config}
    }


def _content(**fields: bool) -> Config:
    grpc = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
    return _header({**grpc, "treat_missing_header_as_empty": True, **fields})


def _header(matcher: Config) -> Config:
    return {"header_filter": {"header": matcher}}

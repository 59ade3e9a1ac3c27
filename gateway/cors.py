"""Cross-origin rules for browsers.

Envoy's own CORS filter leaves answers alone that the gateway makes itself (documents, 404, 413), which a
page could then not read. So a filter of their own adds the headers, and a route answers preflights.
"""

from __future__ import annotations

import re
from typing import Any

from gateway.topology import Cors

Config = dict[str, Any]

_EXPOSED = (
    "accept-ranges, content-range, etag, location, retry-after, server-timing, x-request-id, "
    "x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens"
)
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"


def preflight_route(cors: Cors) -> Config:
    """Answers the question a browser asks before a cross-origin request.

    Every header it asks for is allowed: without cookies a list protects nothing, and SDKs add names.
    """
    headers = {
        "access-control-allow-methods": _METHODS,
        "access-control-allow-headers": "%REQ(ACCESS-CONTROL-REQUEST-HEADERS)%",
        "access-control-max-age": str(cors.max_age),
        "vary": "access-control-request-method, access-control-request-headers",
    }
    return {
        "match": {
            "prefix": "/",
            "headers": [
                {"name": ":method", "string_match": {"exact": "OPTIONS"}},
                {"name": "access-control-request-method", "present_match": True},
                {"name": "origin", "string_match": {"safe_regex": {"regex": _pattern(cors)}}},
            ],
        },
        "direct_response": {"status": 200},
        "response_headers_to_add": [_header(key, value) for key, value in headers.items()],
    }


def cors_filter(cors: Cors) -> Config:
    """Adds the headers that let an allowed origin read an answer; absent from requests without one."""
    mutations = [
        {"append": _header("access-control-allow-origin", "%REQ(ORIGIN)%")},
        {"append": _header("access-control-expose-headers", _EXPOSED)},
        {"append": _header("vary", "origin") | {"append_action": "APPEND_IF_EXISTS_OR_ADD"}},
    ]
    headers = "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"
    allowed = {
        "input": {"name": "origin", "typed_config": {"@type": headers, "header_name": "origin"}},
        "value_match": {"safe_regex": {"google_re2": {}, "regex": _pattern(cors)}},
    }
    skip = f"{_EXTENSIONS}.filters.common.matcher.action.v3.SkipFilter"
    return {
        "@type": f"{_EXTENSIONS}.common.matching.v3.ExtensionWithMatcher",
        "extension_config": {
            "name": "cors_headers",
            "typed_config": {
                "@type": f"{_EXTENSIONS}.filters.http.header_mutation.v3.HeaderMutation",
                "mutations": {"response_mutations": mutations},
            },
        },
        "xds_matcher": {
            "matcher_list": {
                "matchers": [
                    {
                        "predicate": {"not_matcher": {"single_predicate": allowed}},
                        "on_match": {"action": {"name": "skip", "typed_config": {"@type": skip}}},
                    }
                ]
            }
        },
    }


def _pattern(cors: Cors) -> str:
    if "*" in cors.origins:
        return ".+"
    return "|".join(re.escape(origin) for origin in cors.origins)


def _header(key: str, value: str) -> Config:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}

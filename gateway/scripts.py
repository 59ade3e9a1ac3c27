"""The Lua scripts as Envoy gets them: the files beside this module behind the tables they need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gateway.replies import (
    METADATA_NAMESPACE,
    RETRY_AFTER_SECONDS,
    UNKNOWN_MODEL,
    VERBATIM,
    Reply,
    status_table,
)
from gateway.topology import Topology
from services.core.errors import ErrorCode, error_body
from services.core.forms import FORMS

Config = dict[str, Any]

READY_RPC = "/searchfoundation.v1.OpsService/Ready"
POOLS_KEY = "pools"
"""Where the route of /ready tells its script the pools' names, so that a new pool changes routes alone."""
MODEL_SCRIPT, READY_SCRIPT, GRPC_SCRIPT, HEAD_SCRIPT = "model.lua", "ready.lua", "grpc.lua", "head.lua"

# Envoy's filters and the services read these; whatever else a caller sends ends at the gateway.
_KNOWN_HEADERS = (
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "content-encoding",
    "content-length",
    "content-type",
    "if-match",
    "if-none-match",
    "if-range",
    "origin",
    "range",
    "traceparent",
    "tracestate",
    "transfer-encoding",
    "user-agent",
    "x-envoy-external-address",
    "x-fern-sdk-name",  # by which Cohere's clients tell themselves from others on a path of both
    "x-forwarded-for",
    "x-forwarded-proto",  # without it Envoy finds no route
    "x-request-id",
)
_KEY_HEADERS = ("x-goog-api-key", "x-api-key", "api-key")
"""Of Gemini's clients, and of others."""
_KNOWN_GRPC_HEADERS = (
    "grpc-accept-encoding",
    "grpc-encoding",
    "grpc-timeout",
    "te",
    "x-model",
)

_FILLED_IN = "<filled in>"

_FOLDER = Path(__file__).parent
_LUA = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"


def lua_filter(topology: Topology) -> Config:
    """The Lua filter with its default script and those that single routes choose."""
    requests = _known_lua() + _read("filter.lua")
    main = _status_lua(topology) + requests
    # Those that leave answers alone need no words for them.
    alone = "local STATUS = {}\n" + requests
    scripts = {
        MODEL_SCRIPT: alone
        + _assignments(NAMESPACE=METADATA_NAMESPACE, UNKNOWN_MODEL=UNKNOWN_MODEL)
        + _read(MODEL_SCRIPT),
        READY_SCRIPT: alone
        + _assignments(
            NAMESPACE=METADATA_NAMESPACE,
            VERBATIM=VERBATIM,
            READY_RPC=READY_RPC,
            NOT_READY=_not_ready(),
            POOLS_KEY=POOLS_KEY,
        )
        + _read(READY_SCRIPT),
        HEAD_SCRIPT: main + _read(HEAD_SCRIPT),
        GRPC_SCRIPT: alone + f"local GRPC_KNOWN = {_list(_KNOWN_GRPC_HEADERS)}\n" + _read(GRPC_SCRIPT),
    }
    return {
        "@type": _LUA,
        "default_source_code": {"inline_string": main},
        "source_codes": {name: {"inline_string": text} for name, text in scripts.items()},
    }


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _status_lua(topology: Topology) -> str:
    rows = "".join(f"  [{number}] = {_row(reply)},\n" for number, reply in status_table(topology).items())
    return f"local STATUS = {{\n{rows}}}\n"


def _row(reply: Reply) -> str:
    body = _format(reply.body(_FILLED_IN))
    fields = f"status = {quote(str(reply.status))}, body = {quote(body)}"
    for form in FORMS:
        fields += f", {form.name} = {quote(_format(reply.body(_FILLED_IN, form)))}"
    if reply.status == 503:
        fields += f", retry_after = {quote(str(RETRY_AFTER_SECONDS))}"
    return f"{{ {fields} }}"


def _not_ready() -> str:
    return _format(error_body(ErrorCode.SERVICE_UNAVAILABLE, f"Not ready: {_FILLED_IN}.", _FILLED_IN))


def _format(body: Mapping[str, Any]) -> str:
    """A body as a format of Lua, with ``%s`` wherever ``_FILLED_IN`` stands."""
    text = json.dumps(body, separators=(",", ":"))
    return text.replace("%", "%%").replace(_FILLED_IN, "%s")


def _known_lua() -> str:
    known = ", ".join(f"[{quote(name)}] = true" for name in _KNOWN_HEADERS)
    return f"local KNOWN = {{ {known} }}\nlocal KEY_HEADERS = {_list(_KEY_HEADERS)}\n"


def _list(texts: Iterable[str]) -> str:
    return f"{{ {', '.join(map(quote, texts))} }}"


def _assignments(**values: str) -> str:
    return "".join(f"local {name} = {quote(value)}\n" for name, value in values.items())


def quote(text: str) -> str:
    """A Lua string literal; ASCII text only reads the same in JSON and Lua."""
    literal = json.dumps(text)
    if "\\u" in literal:
        raise ValueError(f"not a plain ASCII text: {text!r}")
    return literal

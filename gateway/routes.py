"""Routes: REST calls and gRPC services to pools, documents and errors answered in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gateway.clusters import seconds, way_name
from gateway.contract import RestCall, rest_calls, typed_services
from gateway.cors import preflight_route
from gateway.documents import PREFIXES, Document
from gateway.replies import LARGEST_BODY, METADATA_NAMESPACE
from gateway.scripts import GRPC_SCRIPT, HEAD_SCRIPT, MODEL_SCRIPT, POOLS_KEY, READY_SCRIPT
from gateway.topology import Share, Topology
from services.classify.schema import model_mark
from services.core.catalog.types import Capability
from services.core.errors import ERRORS, ErrorCode
from services.core.forms import form_of

Config = dict[str, Any]

MODEL_KEY = "model"
CLASSIFIER_KEY = "classifier_id"
GRPC_MODEL_HEADER = "x-model"
BASE_URL_HEADER = "x-sf-base-url"
"""Tells a service that answers with URLs where its caller reached the gateway."""
METHOD_HEADER = "x-sf-method"
"""Tells a service that its caller wants the headers of an answer alone (HEAD)."""
BODY_FILTER = "envoy.filters.http.json_to_metadata"
"""Reads a body for the model's name."""
READY_PATH = "/ready"
MODELS_PREFIXES = tuple(f"{prefix}/models/" for prefix in PREFIXES)

_FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
_LUA = "envoy.filters.http.lua"
_BUFFER = "envoy.filters.http.buffer"
_READ_METHODS = ("GET", "HEAD")
_MAKES_URLS = "/v1/batch/embeddings"
_MODEL_IN_PATH = "/models/**"
_VARIABLE = re.compile(r"\{([A-Za-z_.]+)(?:=([^}]*))?\}")
# Whose model it is; the services know the repositories.
_MODEL_PREFIX = "([^/]+/)?"
_MODEL_TAG = "(:latest)?"
"""Ollama's clients may put it behind."""
_GRPC_HEADERS = (
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
    "grpc-accept-encoding",
)
# HTTP/2 callers would get the trailers of the gRPC call that theirs has become.
_ERROR_TRAILERS = ("sf-http-status", "sf-http-body")
# Added by the router and the transcoder after the Lua filter has let known headers through.
_NOT_FORWARDED = [
    "access-control-request-headers",
    "access-control-request-method",
    "content-encoding",
    "x-envoy-original-method",
    "x-envoy-expected-rq-timeout-ms",
    "x-forwarded-proto",
]


def rest_host(
    topology: Topology,
    bodies: Mapping[Capability, int],
    documents: Iterable[Document],
    nameless: Mapping[str, str],
) -> Config:
    """Virtual host of the main listener; ``bodies`` are the largest in bytes of each capability's calls.

    ``nameless`` has the models of calls that name none, by the names of rpcs.
    """
    documents = tuple(documents)
    routes = [
        # A gRPC call is no REST call, whatever its path: without this the transcoder would let it pass.
        *map(_no_such_rpc, _first_segments(topology)),
        *_rest_routes(topology, bodies, nameless),
        *grpc_routes(topology),
        _no_such_rpc("/"),
        *([preflight_route(topology.cors)] if topology.cors.origins else []),
        *(_document(document) for document in documents),
        _ready(topology),
        *_wrong_methods(topology, documents),
        *map(_unknown_model, MODELS_PREFIXES),
        _error({"prefix": "/"}, ErrorCode.ROUTE_NOT_FOUND),
    ]
    host: Config = {"name": "rest", "domains": ["*"], "routes": routes}
    host["request_headers_to_remove"] = _NOT_FORWARDED
    # The Lua filter needs it for the body of an error that a service did not describe.
    host["response_headers_to_add"] = [_set_header("x-request-id", "%REQ(X-REQUEST-ID)%")]
    if routes_by_model(topology):
        # The whole body is read for the model's name before the transcoder takes it.
        host["request_body_buffer_limit"] = topology.limits.max_body_bytes
    else:
        # The filter is there all the same, so that a second pool changes routes and not the listener.
        disabled = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
        host["typed_per_filter_config"] = {BODY_FILTER: disabled}
    return host


def grpc_host(topology: Topology) -> Config:
    """Virtual host of the listener for gRPC alone. Anything else answers UNIMPLEMENTED."""
    routes = [*grpc_routes(topology), _no_such_rpc("/"), _error({"prefix": "/"}, ErrorCode.ROUTE_NOT_FOUND)]
    return {"name": "grpc", "domains": ["*"], "routes": routes}


def routes_by_model(topology: Topology) -> bool:
    """Whether models of a capability go different ways, so that each request's model must be known."""
    return any(len(topology.shares_of(capability)) > 1 for capability in topology.capabilities)


def model_pattern(share: Share) -> str:
    """Regular expression of the names that models of a share may be called by."""
    return f"{_MODEL_PREFIX}({'|'.join(re.escape(model) for model in share.models)}){_MODEL_TAG}"


def _first_segments(topology: Topology) -> Iterable[str]:
    """What the paths of REST calls begin with; POST / is none that gRPC could have."""
    paths = (call.path for capability in topology.capabilities for call in rest_calls(capability))
    return dict.fromkeys(f"/{segment}" for path in paths if (segment := path.split("/")[1]))


def _rest_routes(
    topology: Topology, bodies: Mapping[Capability, int], nameless: Mapping[str, str]
) -> Iterator[Config]:
    for capability in topology.capabilities:
        most = bodies[capability]
        for call in rest_calls(capability):
            answering = nameless.get(call.rpc)
            shares = sorted(topology.shares_of(capability), key=lambda share: answering not in share.models)
            for route in _rest(call, capability, topology, shares):
                told = route.setdefault("metadata", {"filter_metadata": {}})["filter_metadata"]
                told[METADATA_NAMESPACE] = {LARGEST_BODY: str(most)}
                if most < topology.limits.max_body_bytes:
                    route["typed_per_filter_config"][_BUFFER] = _buffer(most)
                yield route


def _buffer(most: int) -> Config:
    return {
        "@type": f"{_FILTERS}.buffer.v3.BufferPerRoute",
        "buffer": {"max_request_bytes": most},
    }


def _rest(
    call: RestCall, capability: Capability, topology: Topology, shares: Sequence[Share]
) -> Iterator[Config]:
    """Routes of a call; the first of the shares takes what names no model."""
    match = _path_match(call.path) | {"headers": [_method(call.method)]}
    default, *others = shares
    if others and capability is Capability.CLASSIFY:
        # A classifier goes before a model that the body may name as well.
        for share in (default, *others):
            yield _rest_route(
                match | {"dynamic_metadata": [_classifier_in_body(share)]}, share, topology, call
            )
    for share in others:
        if _MODEL_IN_PATH in call.path:
            path = _path_regex(_template_pattern(call.path, model_pattern(share)))
            yield _rest_route(match | path, share, topology, call)
        else:
            yield _rest_route(match | {"dynamic_metadata": [_model_in_body(share)]}, share, topology, call)
    yield _rest_route(match, default, topology, call)


def _rest_route(match: Config, share: Share, topology: Topology, call: RestCall) -> Config:
    route: Config = {
        "match": match,
        "route": _to(share, topology, 0 if call.streaming else topology.timeouts.request),
        "typed_per_filter_config": {"envoy.filters.http.header_mutation": _without_grpc_headers()},
    }
    if form := form_of(call.rpc):
        route["metadata"] = {"filter_metadata": {_LUA: {"form": form.name}}}
    if call.path == _MAKES_URLS:
        route["request_headers_to_add"] = [_set_header(BASE_URL_HEADER, "%REQ(:SCHEME)%://%REQ(:AUTHORITY)%")]
    elif call.method == "HEAD":
        route["request_headers_to_add"] = [_set_header(METHOD_HEADER, call.method)]
        route["typed_per_filter_config"][_LUA] = _script(HEAD_SCRIPT)
    return route


def _without_grpc_headers() -> Config:
    headers = [{"remove": name} for name in _GRPC_HEADERS]
    trailers = [{"remove": name} for name in (*_GRPC_HEADERS, *_ERROR_TRAILERS)]
    return {
        "@type": f"{_FILTERS}.header_mutation.v3.HeaderMutationPerRoute",
        "mutations": {"response_mutations": headers, "response_trailers_mutations": trailers},
    }


def grpc_routes(topology: Topology) -> Iterator[Config]:
    """Routes of the typed services, told apart by the caller's ``x-model`` metadata.

    The caller's own deadline holds; streams may last as long as something moves on them.
    """
    for capability in topology.capabilities:
        default, *others = topology.shares_of(capability)
        for service in typed_services(capability):
            match: Config = {"prefix": f"/{service}/", "grpc": {}}
            for share in others:
                header = {"name": GRPC_MODEL_HEADER, "string_match": _regex(model_pattern(share))}
                yield _grpc(match | {"headers": [header]}, share, topology)
            yield _grpc(match, default, topology)
    if len(topology.pools) == 1:
        for service in ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"):
            share = Share(topology.pools[0].models, topology.pools)
            yield _grpc({"prefix": f"/{service}/", "grpc": {}}, share, topology)


def _grpc(match: Config, share: Share, topology: Topology) -> Config:
    action = _to(share, topology, 0)
    action["max_stream_duration"] = {"grpc_timeout_header_max": "0s"}
    return {"match": match, "route": action, "typed_per_filter_config": {_LUA: _script(GRPC_SCRIPT)}}


def _no_such_rpc(prefix: str) -> Config:
    route = _error({"prefix": prefix, "grpc": {}}, ErrorCode.ROUTE_NOT_FOUND)
    route["typed_per_filter_config"] = {_LUA: _script(GRPC_SCRIPT)}
    return route


def _to(share: Share, topology: Topology, timeout: float) -> Config:
    names = {way_name(way): way[0].weight for way in share.ways()}
    if len(names) == 1:
        target: Config = {"cluster": next(iter(names))}
    else:
        target = {
            "weighted_clusters": {"clusters": [{"name": name, "weight": names[name]} for name in names]}
        }
    # Only what surely never reached a service is sent again: repeating a call that did would bill it twice.
    return {
        **target,
        "timeout": seconds(timeout),
        "idle_timeout": seconds(max(topology.timeouts.idle, topology.timeouts.request)),
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset-before-request",
            "num_retries": 2,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": "type.googleapis.com/"
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
            "host_selection_retry_max_attempts": 20,
        },
    }


def _document(document: Document) -> Config:
    match: Config = _path_match(document.path) if document.path else _path_regex(document.pattern)
    methods = {"name": ":method", "string_match": _regex("|".join(_READ_METHODS))}
    return {
        "match": match | {"headers": [methods]},
        "direct_response": {"status": 200, "body": {"inline_string": document.body}},
        "response_headers_to_add": [_set_header("content-type", "application/json")],
    }


def _ready(topology: Topology) -> Config:
    # The script answers; the direct response stands for a script that failed.
    route = _error(_path_match(READY_PATH), ErrorCode.SERVICE_UNAVAILABLE)
    route["match"]["headers"] = [{"name": ":method", "string_match": _regex("|".join(_READ_METHODS))}]
    context = {POOLS_KEY: [pool.name for pool in topology.pools]}
    route["typed_per_filter_config"] = {_LUA: _script(READY_SCRIPT) | {"filter_context": context}}
    return route


def _wrong_methods(topology: Topology, documents: tuple[Document, ...]) -> Iterator[Config]:
    allowed: dict[str, list[str]] = {}
    for capability in topology.capabilities:
        for call in rest_calls(capability):
            allowed.setdefault(call.path, []).append(call.method)
    for path, methods in allowed.items():
        yield _wrong_method(_path_match(path), methods)
    for document in documents:
        if document.path:
            yield _wrong_method(_path_match(document.path), _READ_METHODS)
    yield _wrong_method(_path_match(READY_PATH), _READ_METHODS)
    unread = {"name": ":method", "string_match": _regex("|".join(_READ_METHODS)), "invert_match": True}
    for prefix in MODELS_PREFIXES:
        yield _wrong_method({"prefix": prefix, "headers": [unread]}, _READ_METHODS)


def _wrong_method(match: Config, allowed: Iterable[str]) -> Config:
    route = _error(match, ErrorCode.METHOD_NOT_ALLOWED)
    route["response_headers_to_add"] = [_set_header("allow", ", ".join(allowed))]
    return route


def _unknown_model(prefix: str) -> Config:
    route = _error({"prefix": prefix}, ErrorCode.ROUTE_NOT_FOUND)
    route["typed_per_filter_config"] = {_LUA: _script(MODEL_SCRIPT)}
    return route


def _error(match: Config, code: ErrorCode) -> Config:
    return {"match": match, "direct_response": {"status": ERRORS[code].http_status}}


def _path_match(template: str) -> Config:
    return _path_regex(_template_pattern(template))


def _path_regex(pattern: str) -> Config:
    """Match a path with one slash more at its end as well; the Lua filter takes that away."""
    return {"safe_regex": {"regex": f"{pattern}/?"}}


def _template_pattern(template: str, rest: str = ".+") -> str:
    """Regular expression of a path template; ``rest`` stands for ``**``."""
    pattern, end = "", 0
    for variable in _VARIABLE.finditer(template):
        pattern += _segments(template[end : variable.start()], rest) + _segments(variable[2] or "*", rest)
        end = variable.end()
    return pattern + _segments(template[end:], rest)


def _segments(template: str, rest: str) -> str:
    return re.escape(template).replace(r"\*\*", rest).replace(r"\*", "[^/]+")


def _model_in_body(share: Share) -> Config:
    return _in_body(MODEL_KEY, model_pattern(share))


def _classifier_in_body(share: Share) -> Config:
    """Match the ids of classifiers over a share's models."""
    marks = "|".join(model_mark(model) for model in share.models)
    return _in_body(CLASSIFIER_KEY, f"(?i)({marks})-.*")


def _in_body(key: str, pattern: str) -> Config:
    return {
        "filter": METADATA_NAMESPACE,
        "path": [{"key": key}],
        "value": {"string_match": _regex(pattern)},
    }


def _method(name: str) -> Config:
    return {"name": ":method", "string_match": {"exact": name}}


def _regex(pattern: str) -> Config:
    return {"safe_regex": {"regex": pattern}}


def _script(name: str) -> Config:
    return {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute", "name": name}


def _set_header(key: str, value: str) -> Config:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}

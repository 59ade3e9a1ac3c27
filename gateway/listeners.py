"""Envoy listeners: the filter chain a REST call passes, and the port for gRPC alone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.access_log import access_log
from gateway.clusters import ADMIN_CLUSTER, seconds
from gateway.contract import descriptor_set, rest_services
from gateway.cors import cors_filter
from gateway.documents import Document
from gateway.replies import METADATA_NAMESPACE, grpc_replies, local_replies
from gateway.routes import BODY_FILTER, CLASSIFIER_KEY, MODEL_KEY, grpc_host, rest_host
from gateway.scripts import lua_filter
from gateway.topology import Address, Listener, ServerTls, Topology
from gateway.unpacking import unpacking_filters
from services.core.catalog.types import Capability

Config = dict[str, Any]

METRICS_PATH = "/stats/prometheus"
LIVE_PATH = "/live"

_FILTERS = "type.googleapis.com/envoy.extensions.filters"
_TLS_CONTEXT = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
_CONNECTION_BUFFER = 64 << 10
"""Bytes read at a time, at most. What they unpack to must fit into memory."""
_MAX_DOCUMENT_BYTES = 8 << 20
_NOWHERE = {"address_prefix": "255.255.255.255", "prefix_len": 32}


def rest_listener(
    topology: Topology,
    bodies: Mapping[Capability, int],
    documents: Iterable[Document],
    nameless: Mapping[str, str],
) -> Config:
    """The main listener: REST, and gRPC calls of the typed services.

    ``bodies`` are the largest body in bytes of each capability's calls, ``nameless`` the models of calls that
    name none.
    """
    host = rest_host(topology, bodies, documents, nameless)
    manager = _manager("rest", topology.listener, topology, host, _rest_filters(topology))
    manager["local_reply_config"] = local_replies(topology)
    return _listener("rest", topology.listener, manager)


def grpc_listener(listener: Listener, topology: Topology) -> Config:
    """The port for gRPC alone."""
    filters = [_filter("lua", lua_filter(topology)), _router()]
    manager = _manager("grpc", listener, topology, grpc_host(topology), filters)
    manager["local_reply_config"] = grpc_replies()
    return _listener("grpc", listener, manager)


def metrics_listener(listener: Listener) -> Config:
    """The port for Prometheus and liveness probes: Envoy's statistics and nothing else of its admin pages.

    It answers however many connections and calls the other ports have, so that load alone restarts nothing.
    """
    get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    routes = [
        {"match": {"path": METRICS_PATH, "headers": get}, "route": {"cluster": ADMIN_CLUSTER}},
        {"match": {"path": LIVE_PATH, "headers": get}, "direct_response": {"status": 200}},
    ]
    manager: Config = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "metrics",
        "route_config": {
            "name": "metrics",
            "virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": routes}],
        },
        "http_filters": [_router()],
        "http_protocol_options": _http1(listener),
    }
    outside_of_limits = {"ignore_global_conn_limit": True, "bypass_overload_manager": True}
    return _listener("metrics", listener, manager) | outside_of_limits


def _listener(name: str, listener: Listener, manager: Config) -> Config:
    chain: Config = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    if listener.tls is not None:
        chain["transport_socket"] = _tls(listener.tls)
    return {
        "name": name,
        "address": {"socket_address": {"address": listener.host, "port_value": listener.port}},
        "per_connection_buffer_limit_bytes": _CONNECTION_BUFFER,
        "filter_chains": [chain],
        # A second process must not take half of the connections unnoticed.
        "enable_reuse_port": False,
    }


def _http1(listener: Listener) -> Config:
    # Old proxies and probes speak HTTP/1.0.
    return {
        "accept_http_10": True,
        "default_host_for_http_10": str(Address(listener.host, listener.port)),
    }


def _manager(
    name: str, listener: Listener, topology: Topology, host: Config, filters: list[Config]
) -> Config:
    limits, timeouts = topology.limits, topology.timeouts
    return {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "route_config": {
            "name": name,
            "virtual_hosts": [host],
            "max_direct_response_body_size_bytes": _MAX_DOCUMENT_BYTES,
            "validate_clusters": True,
        },
        "http_filters": filters,
        "access_log": access_log(topology.access_log, topology.log_format),
        "server_name": "search-foundation",
        "use_remote_address": True,
        "xff_num_trusted_hops": topology.trusted_proxies,
        # Nobody is "internal": such callers could steer the gateway by x-envoy-* headers.
        "internal_address_config": {"cidr_ranges": [_NOWHERE]},
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "normalize_path": True,
        "merge_slashes": True,
        "common_http_protocol_options": {
            "idle_timeout": seconds(timeouts.idle),
            "max_headers_count": limits.max_headers,
            "headers_with_underscores_action": "DROP_HEADER",
        },
        "http_protocol_options": _http1(listener) | {"allow_chunked_length": False},
        "http2_protocol_options": {
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 256 << 10,
            "initial_connection_window_size": 4 << 20,
        },
        "max_request_headers_kb": limits.max_header_kib,
        "request_headers_timeout": seconds(timeouts.headers),
        "request_timeout": seconds(timeouts.receive),
        "stream_idle_timeout": seconds(max(timeouts.idle, timeouts.request)),
        "drain_timeout": seconds(timeouts.drain),
    }


def _rest_filters(topology: Topology) -> list[Config]:
    limit = topology.limits.max_body_bytes
    filters: list[Config] = []
    if topology.compression:
        filters.append(_filter("compressor", _compressor()))
    if topology.cors.origins:
        filters.append({"name": "cors_headers", "typed_config": cors_filter(topology.cors)})
    filters.extend(unpacking_filters())
    filters.append(
        _filter("header_mutation", {"@type": f"{_FILTERS}.http.header_mutation.v3.HeaderMutation"})
    )
    filters.append(_filter("lua", lua_filter(topology)))
    # Routes with a bound below the transcoder's own switch it on.
    buffer: Config = {"@type": f"{_FILTERS}.http.buffer.v3.Buffer", "max_request_bytes": limit}
    filters.append(_filter("buffer", buffer) | {"disabled": True})
    filters.append({"name": BODY_FILTER, "typed_config": _body_to_metadata()})
    filters.append(_filter("grpc_json_transcoder", _transcoder(topology)))
    filters.append(_router())
    return filters


def _filter(name: str, config: Config) -> Config:
    return {"name": f"envoy.filters.http.{name}", "typed_config": config}


def _router() -> Config:
    return _filter("router", {"@type": f"{_FILTERS}.http.router.v3.Router", "suppress_envoy_headers": True})


def _transcoder(topology: Topology) -> Config:
    services = [name for capability in topology.capabilities for name in rest_services(capability)]
    return {
        "@type": f"{_FILTERS}.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor_bin": base64.b64encode(descriptor_set(topology.capabilities)).decode(),
        "services": services,
        # Routes are those of the REST paths, so nothing but them is reachable.
        "match_incoming_request_route": True,
        "ignore_unknown_query_parameters": True,
        "max_request_body_size": topology.limits.max_body_bytes,
        "max_response_body_size": topology.limits.max_response_bytes,
    }


def _body_to_metadata() -> Config:
    """Lift what routes look at out of JSON bodies."""
    rules = [
        {
            "selectors": [{"key": key}],
            "on_present": {"metadata_namespace": METADATA_NAMESPACE, "key": key, "type": "STRING"},
        }
        for key in (MODEL_KEY, CLASSIFIER_KEY)
    ]
    return {
        "@type": f"{_FILTERS}.http.json_to_metadata.v3.JsonToMetadata",
        "request_rules": {
            "rules": rules,
            "allow_empty_content_type": True,
            "allow_content_types_regex": {"regex": ".*"},
        },
    }


def _compressor() -> Config:
    gzip = "type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip"
    return {
        "@type": f"{_FILTERS}.http.compressor.v3.Compressor",
        "response_direction_config": {"common_config": {"min_content_length": 1024}},
        "compressor_library": {
            "name": "gzip",
            "typed_config": {"@type": gzip, "compression_level": "BEST_SPEED", "chunk_size": 65536},
        },
    }


def _tls(tls: ServerTls) -> Config:
    common: Config = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(tls.certificate)},
                "private_key": {"filename": str(tls.private_key)},
            }
        ],
    }
    context: Config = {"@type": f"type.googleapis.com/{_TLS_CONTEXT}", "common_tls_context": common}
    if tls.client_ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": str(tls.client_ca)}}
        context["require_client_certificate"] = True
    return {"name": "tls", "typed_config": context}

"""Envoy clusters: one per pool, with health checks, circuit breakers and TLS to the services."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from gateway.topology import Address, ClientTls, Listener, Pool, Topology

Config = dict[str, Any]

ADMIN_CLUSTER = "envoy_admin"

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TLS_CONTEXT = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_AGGREGATE = "envoy.extensions.clusters.aggregate.v3.ClusterConfig"
_WINDOW = 16 << 20
_KEEPALIVE_SECONDS = 60.0
"""A peer that answers no ping for so long is gone. Far above any stall, since closing ends all its calls."""


def pool_cluster(pool: Pool, topology: Topology) -> Config:
    """Cluster of a pool. An endpoint is used while its gRPC health says SERVING.

    Slowness takes nobody out who is alone: there is nowhere better to send the call.
    """
    limits = topology.limits
    alone = pool.service is None and len(pool.endpoints) == 1 and _is_literal(pool.endpoints[0])
    cluster: Config = {
        "name": pool.name,
        "type": "STATIC" if all(_is_literal(address) for address in pool.endpoints) else "STRICT_DNS",
        "connect_timeout": seconds(topology.timeouts.connect),
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {
            # Several that are all too slow to say that they serve are all used; a few that are, are not.
            "healthy_panic_threshold": {"value": 0 if alone else 1},
            # The workers learn of a dead endpoint at once, not after a second of collecting changes.
            "update_merge_window": "0s",
        },
        # Restarted pods appear under new addresses: let go of the old ones as soon as they fail.
        "ignore_health_on_host_removal": True,
        "load_assignment": load_assignment(pool),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _http2(topology)
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": limits.max_connections,
                    "max_pending_requests": limits.max_requests_per_pool,
                    "max_requests": limits.max_requests_per_pool,
                    # A dead endpoint looks least busy, so every call tries it first until it is ejected.
                    "retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 64},
                }
            ]
        },
    }
    if topology.health_check.active:
        cluster["health_checks"] = [_health_check(topology, patient=alone)]
    if not alone:
        cluster["outlier_detection"] = _outlier_detection()
    if topology.services_tls is not None:
        cluster["transport_socket"] = _tls(topology.services_tls, pool)
    return cluster


def load_assignment(pool: Pool) -> Config:
    """The endpoints of a pool."""
    endpoints = [_endpoint(address) for address in pool.endpoints]
    return {"cluster_name": pool.name, "endpoints": [{"lb_endpoints": endpoints}]}


def way_name(way: Sequence[Pool]) -> str:
    """Name of the cluster that tries these pools in turn; that of the pool itself where it is one."""
    return "+".join(pool.name for pool in way)


def way_clusters(topology: Topology) -> list[Config]:
    """Clusters that send a call to a pool, and to others where that one has too few healthy endpoints."""
    shares = (share for capability in topology.capabilities for share in topology.shares_of(capability))
    ways = {way_name(way): way for share in shares for way in share.ways() if len(way) > 1}
    return [
        {
            "name": name,
            "connect_timeout": seconds(topology.timeouts.connect),
            "lb_policy": "CLUSTER_PROVIDED",
            "cluster_type": {
                "name": "envoy.clusters.aggregate",
                "typed_config": {
                    "@type": f"type.googleapis.com/{_AGGREGATE}",
                    "clusters": [pool.name for pool in way],
                },
            },
        }
        for name, way in ways.items()
    ]


def admin_cluster(admin: Listener) -> Config:
    """Cluster of Envoy's own admin page."""
    endpoint = _endpoint(Address(admin.host, admin.port))
    return {
        "name": ADMIN_CLUSTER,
        "type": "STATIC",
        "load_assignment": {"cluster_name": ADMIN_CLUSTER, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def seconds(value: float) -> str:
    """A duration as protobuf's JSON writes it."""
    return f"{value:.9f}".rstrip("0").rstrip(".") + "s"


def socket_address(address: Address) -> Config:
    """Envoy's form of an address."""
    if address.path:
        return {"pipe": {"path": address.path}}
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _endpoint(address: Address) -> Config:
    return {"endpoint": {"address": socket_address(address)}}


def _is_literal(address: Address) -> bool:
    if address.path:
        return True
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        return False
    return True


def _http2(topology: Topology) -> Config:
    return {
        "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
        "explicit_http_config": {
            "http2_protocol_options": {
                "max_concurrent_streams": topology.limits.max_requests_per_pool,
                "initial_stream_window_size": _WINDOW,
                "initial_connection_window_size": 4 * _WINDOW,
                # A peer that vanished is noticed before TCP does; health checks see it sooner.
                "connection_keepalive": {"interval": "30s", "timeout": seconds(_patience(topology))},
            }
        },
        # A 422 names the bad fields in trailing metadata; HTTP/2 itself allows an entry 64 KiB.
        "common_http_protocol_options": {"max_response_headers_kb": 96, "idle_timeout": "3600s"},
    }


def _patience(topology: Topology) -> float:
    return max(_KEEPALIVE_SECONDS, topology.timeouts.request)


def _health_check(topology: Topology, *, patient: bool) -> Config:
    """Refused connections and NOT_SERVING fail a check at once; ``patient`` waits long for one in silence."""
    check = topology.health_check
    return {
        "timeout": seconds(_patience(topology) if patient else check.timeout),
        "interval": seconds(check.interval),
        "no_traffic_interval": seconds(check.interval),
        "unhealthy_interval": seconds(check.unhealthy_interval),
        "unhealthy_edge_interval": seconds(check.unhealthy_interval),
        "no_traffic_healthy_interval": seconds(check.interval),
        "unhealthy_threshold": check.unhealthy_after,
        "healthy_threshold": 1,
        "grpc_health_check": {},
        "always_log_health_check_failures": False,
    }


def _outlier_detection() -> Config:
    # Only failures of the endpoint itself count (no connection, resets, no answer in time). Statuses do
    # not: an endpoint with a full queue answers 503 in good health, and ejecting it would move its load on.
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_local_origin_success_rate": 0,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "5s",
        "max_ejection_time": "60s",
        "max_ejection_percent": 50,
    }


def _tls(tls: ClientTls, pool: Pool) -> Config:
    name = pool.server_name or tls.server_name or pool.endpoints[0].host
    common: Config = {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "validation_context": {
            "trusted_ca": {"filename": str(tls.ca)},
            "match_typed_subject_alt_names": [_subject(name)],
        },
    }
    if tls.certificate is not None:
        common["tls_certificates"] = [
            {
                "certificate_chain": {"filename": str(tls.certificate)},
                "private_key": {"filename": str(tls.private_key)},
            }
        ]
    context: Config = {"@type": f"type.googleapis.com/{_TLS_CONTEXT}", "common_tls_context": common}
    if not _is_literal(Address(host=name)):
        context["sni"] = name
    return {"name": "tls", "typed_config": context}


def _subject(name: str) -> Config:
    kind = "IP_ADDRESS" if _is_literal(Address(host=name)) else "DNS"
    return {"san_type": kind, "matcher": {"exact": name}}

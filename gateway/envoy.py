"""A topology in, Envoy's configuration out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from gateway.clusters import admin_cluster, pool_cluster, way_clusters
from gateway.documents import documents, vendor_documents
from gateway.listeners import grpc_listener, metrics_listener, rest_listener
from gateway.topology import Topology
from services.core.catalog.types import Capability, ModelSpec

Config = dict[str, Any]

_DUMPER: type[yaml.SafeDumper] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's is ten times as fast, where PyYAML was built with it."""

_LOGS: Mapping[str, Config] = {
    "json": {"json_format": {"time": "%Y-%m-%dT%T.%eZ", "level": "%l", "logger": "%n", "message": "%j"}},
    "text": {"text_format": "%T  %l: %v"},
}


def render(
    topology: Topology,
    model_infos: Mapping[str, Mapping[str, Any]],
    bodies: Mapping[Capability, int],
    openapi: Mapping[str, Any] | None = None,
    specs: Iterable[ModelSpec] = (),
    nameless: Mapping[str, str] | None = None,
) -> Config:
    """Envoy's bootstrap configuration as plain data.

    ``model_infos`` holds the public ModelInfo of every model in the topology, by id; ``bodies`` the largest
    body in bytes of each capability's calls; ``openapi`` is the document served at /openapi.json; ``specs``
    are models that clients of other vendors are told of; ``nameless`` has the models of calls that name
    none, by the names of rpcs.
    """
    served = (*documents(topology, model_infos, openapi), *vendor_documents(specs))
    listeners = [rest_listener(topology, bodies, served, nameless or {})]
    if topology.grpc_listener is not None:
        listeners.append(grpc_listener(topology.grpc_listener, topology))
    clusters = [pool_cluster(pool, topology) for pool in topology.pools]
    clusters.extend(way_clusters(topology))
    if topology.metrics is not None and topology.admin is not None:
        listeners.append(metrics_listener(topology.metrics))
        clusters.append(admin_cluster(topology.admin))
    config: Config = {
        "node": {"id": "gateway", "cluster": "search-foundation"},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "overload_manager": _overload_manager(topology),
        "application_log_config": {"log_format": _LOGS[topology.log_format]},
    }
    if topology.admin is not None:
        address = {"address": topology.admin.host, "port_value": topology.admin.port}
        config["admin"] = {"address": {"socket_address": address}}
    return config


def to_yaml(config: Config) -> str:
    """The configuration as the file Envoy reads."""
    return yaml.dump(config, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=120)


def _overload_manager(topology: Topology) -> Config:
    monitors = "type.googleapis.com/envoy.extensions.resource_monitors"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": f"{monitors}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": topology.limits.max_connections,
                },
            },
            {
                "name": "envoy.resource_monitors.fixed_heap",
                "typed_config": {
                    "@type": f"{monitors}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": topology.limits.max_heap_bytes,
                },
            },
        ],
        "actions": [
            _action("envoy.overload_actions.shrink_heap", 0.90),
            _action("envoy.overload_actions.stop_accepting_requests", 0.98),
        ],
    }


def _action(name: str, heap: float) -> Config:
    trigger = {"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": heap}}
    return {"name": name, "triggers": [trigger]}

"""The configuration as files that a running Envoy watches (file-based xDS), and their change in a safe order.

One folder per kind, since Envoy reads every file of a folder again when one in it is renamed: ``cds``
(clusters), ``eds`` (endpoints of a cluster), ``lds`` (listeners), ``rds`` (routes of a listener) and ``sds``
(where certificates are, whose own folders Envoy watches: one that is renewed is shown at the next handshake).
``envoy.yaml`` beside them is the bootstrap, which holds only what needs a restart: admin page, metrics port,
memory and threads.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.clusters import ADMIN_CLUSTER, load_assignment
from gateway.envoy import to_yaml
from gateway.process import EnvoyError, read_admin
from gateway.topology import Listener, Topology
from services.core.catalog import CatalogError
from services.core.settings import ConfigurationError

Config = dict[str, Any]

BOOTSTRAP = "envoy.yaml"
_METRICS = "metrics"
_TYPES = {
    "cds": "envoy.config.cluster.v3.Cluster",
    "eds": "envoy.config.endpoint.v3.ClusterLoadAssignment",
    "lds": "envoy.config.listener.v3.Listener",
    "rds": "envoy.config.route.v3.RouteConfiguration",
    "sds": "envoy.extensions.transport_sockets.tls.v3.Secret",
}
_CLUSTERS = ("cds", "clusters")
_LISTENERS = ("lds", "listeners")
_APPLIED_SECONDS = 15.0
"""A new cluster is warm once its endpoints' first health check has ended."""
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 0.5
_SETTLE_SECONDS = 0.1
_RETRY_SECONDS = 5.0

Name = tuple[str, str]
"""Kind and name of a file: ``("rds", "rest")`` is rds/rest.json."""


@dataclass(frozen=True)
class Files:
    """A configuration in files: the bootstrap, and the resources of each file."""

    bootstrap: Config
    resources: Mapping[Name, list[Config]]


def split(config: Config, folder: Path) -> Files:
    """Split a whole configuration into the bootstrap and the files below ``folder`` that it points to."""
    config = copy.deepcopy(config)
    static: Config = config.pop("static_resources")
    resources: dict[Name, list[Config]] = {_CLUSTERS: [], _LISTENERS: []}
    for listener in static["listeners"]:
        if listener["name"] != _METRICS:
            resources["rds", listener["name"]] = [_routes_apart(listener, folder)]
            chain: Config = listener["filter_chains"][0]
            resources |= _secrets_apart(chain, listener["name"], folder)
            resources[_LISTENERS].append(listener)
    for cluster in static["clusters"]:
        if cluster["name"] == ADMIN_CLUSTER:
            continue
        if cluster.get("type") == "STATIC":
            resources["eds", cluster["name"]] = [_endpoints_apart(cluster, folder)]
        resources |= _secrets_apart(cluster, "services", folder)
        resources[_CLUSTERS].append(cluster)
    config["static_resources"] = {
        "listeners": [listener for listener in static["listeners"] if listener["name"] == _METRICS],
        "clusters": [cluster for cluster in static["clusters"] if cluster["name"] == ADMIN_CLUSTER],
    }
    config["dynamic_resources"] = {
        "cds_config": _source(folder, *_CLUSTERS),
        "lds_config": _source(folder, *_LISTENERS),
    }
    return Files(config, resources)


class Publisher:
    """Writes configurations into a folder, the first for Envoy to start with, the others for it to take up.

    Everything a change needs is there before what refers to it: endpoints, clusters, and once these are warm,
    listeners and routes; what nothing refers to any more goes last. A call finds the old routes or the new.
    """

    def __init__(self, folder: Path, admin: Listener | None) -> None:
        self._folder = folder
        self._admin = admin

    async def publish(self, config: Config) -> bool:
        """Write what differs from the files that are there; whether there was anything.

        Raises EnvoyError when the running Envoy refuses it: the routes are then as before. Raises OSError
        when the folder cannot be written.
        """
        wanted = split(config, self._folder)
        resources = wanted.resources
        changed = self._put_bootstrap(wanted.bootstrap)
        there = {name: self._read(name) for name in self._names()}
        for name in resources:
            if name[0] in ("eds", "sds"):
                changed |= self._put(name, resources[name], there)
        names = {cluster["name"] for cluster in resources[_CLUSTERS]}
        leaving = [c for c in there.get(_CLUSTERS, []) if c["name"] not in names]
        if self._put(_CLUSTERS, [*resources[_CLUSTERS], *leaving], there):
            changed = True
            await self._until_taken(_CLUSTERS, "cluster_manager.cds")
        if self._put(_LISTENERS, resources[_LISTENERS], there):
            changed = True
            await self._until_taken(_LISTENERS, "listener_manager.lds")
        for name in resources:
            if name[0] == "rds" and self._put(name, resources[name], there):
                changed = True
                await self._until_taken(name, f"http.{name[1]}.rds.{name[1]}")
        if leaving:
            self._put(_CLUSTERS, resources[_CLUSTERS], {})
        for name in there.keys() - resources.keys():
            self._path(name).unlink()
        return changed

    def put_endpoints(self, topology: Topology) -> None:
        """Write the endpoints of pools of a Service where they differ, and nothing else."""
        for pool in topology.pools:
            name = ("eds", pool.name)
            if pool.service is not None and self._path(name).exists():
                self._put(name, [load_assignment(pool)], {name: self._read(name)})

    def _put_bootstrap(self, bootstrap: Config) -> bool:
        path = self._folder / BOOTSTRAP
        text = to_yaml(bootstrap)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return False
        _replace(path, text)
        return True

    def _put(self, name: Name, resources: list[Config], there: Mapping[Name, list[Config]]) -> bool:
        """Write a file unless it says so already."""
        kind = f"type.googleapis.com/{_TYPES[name[0]]}"
        typed = [{"@type": kind, **resource} for resource in resources]
        if there.get(name) == typed:
            return False
        document = {"version_info": str(time.time_ns()), "resources": typed}
        _replace(self._path(name), json.dumps(document))
        return True

    def _names(self) -> Iterable[Name]:
        return [(kind, path.stem) for kind in _TYPES for path in (self._folder / kind).glob("*.json")]

    def _read(self, name: Name) -> list[Config]:
        return json.loads(self._path(name).read_text(encoding="utf-8"))["resources"]

    def _path(self, name: Name) -> Path:
        return self._folder / name[0] / f"{name[1]}.json"

    async def _until_taken(self, name: Name, statistics: str) -> None:
        """Wait until a running Envoy works with a file; at once when none runs yet."""
        if self._admin is None:
            return
        version = json.loads(self._path(name).read_text(encoding="utf-8"))["version_info"]
        until = time.monotonic() + _APPLIED_SECONDS
        while True:
            try:
                stats = await _statistics(self._admin, statistics)
            except EnvoyError:
                return
            taken = stats.get(f"{statistics}.version_text") == version
            if taken and (name != _CLUSTERS or stats.get("cluster_manager.warming_clusters") == "0"):
                return
            if taken and time.monotonic() > until:
                return  # a pool whose endpoints do not answer holds back nobody else's routes
            if time.monotonic() > until:
                raise EnvoyError(f"Envoy did not take up {self._path(name)}: its log says why.")
            await asyncio.sleep(_POLL_SECONDS)


async def follow(paths: Iterable[Path], build: Callable[[], Config], publisher: Publisher) -> None:
    """Publish what ``build`` makes whenever one of the files it reads changes, for ever.

    What cannot be built or is refused is told on stderr, and the gateway goes on as it is; it is tried again
    every few seconds, since what a change needs may come later than the change. A file that is written in
    place is at first empty, which would be a topology too, of other ports: a change counts once it stays.
    """
    paths = tuple(paths)
    known, told, tried = _contents(paths), "", 0.0
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = _contents(paths)
        if now == known and not (told and time.monotonic() - tried > _RETRY_SECONDS):
            continue
        if now != known:
            now = await _settled(paths, now)
        known, tried = now, time.monotonic()
        try:
            changed = await publisher.publish(build())
        except (CatalogError, ConfigurationError, EnvoyError, OSError) as error:
            if str(error) != told:
                print(f"search-foundation: the gateway stays as it is: {error}", file=sys.stderr, flush=True)
            told = str(error)
        else:
            told = ""
            if changed:
                print("search-foundation: the gateway took up the change", file=sys.stderr, flush=True)


async def _settled(paths: Iterable[Path], now: list[bytes | None]) -> list[bytes | None]:
    """What the files hold once two reads in a row tell the same; ``now`` is the first."""
    while True:
        await asyncio.sleep(_SETTLE_SECONDS)
        before, now = now, _contents(paths)
        if now == before:
            return now


def _contents(paths: Iterable[Path]) -> list[bytes | None]:
    """What the files hold; a ConfigMap's are links that are swapped, so their times tell nothing."""
    return [path.read_bytes() if path.exists() else None for path in paths]


async def _statistics(admin: Listener, prefix: str) -> dict[str, str]:
    names = f"^({prefix}.version_text|cluster_manager.warming_clusters)$"
    text = await read_admin(admin, f"/stats?filter={names}")
    rows = (line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return {name: value.strip('"') for name, value in rows}


def _routes_apart(listener: Config, folder: Path) -> Config:
    """Take a listener's routes out of it; returns them."""
    manager: Config = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes: Config = manager.pop("route_config")
    # Clusters come by a file of their own, which Envoy may read later.
    routes.pop("validate_clusters", None)
    source = _source(folder, "rds", routes["name"])
    manager["rds"] = {"route_config_name": routes["name"], "config_source": source}
    return routes


def _endpoints_apart(cluster: Config, folder: Path) -> Config:
    """Take a cluster's endpoints out of it; returns them."""
    endpoints: Config = cluster.pop("load_assignment")
    cluster["type"] = "EDS"
    cluster["eds_cluster_config"] = {"eds_config": _source(folder, "eds", cluster["name"])}
    return endpoints


def _secrets_apart(holder: Config, owner: str, folder: Path) -> dict[Name, list[Config]]:
    """Take the certificates out of a listener's or cluster's TLS; returns where they are, by file."""
    found: dict[Name, list[Config]] = {}
    common: Config = holder.get("transport_socket", {}).get("typed_config", {}).get("common_tls_context", {})
    for certificate in common.pop("tls_certificates", ()):
        name = f"{owner}-certificate"
        watched = certificate | _watched(certificate["certificate_chain"])
        found["sds", name] = [{"name": name, "tls_certificate": watched}]
        source = {"name": name, "sds_config": _source(folder, "sds", name)}
        common["tls_certificate_sds_secret_configs"] = [source]
    if validation := common.pop("validation_context", None):
        name = f"{owner}-authority"
        authority: Config = validation.pop("trusted_ca")
        context = {"trusted_ca": authority, **_watched(authority)}
        found["sds", name] = [{"name": name, "validation_context": context}]
        common["combined_validation_context"] = {
            "default_validation_context": validation,
            "validation_context_sds_secret_config": {
                "name": name,
                "sds_config": _source(folder, "sds", name),
            },
        }
    return found


def _watched(file: Config) -> Config:
    return {"watched_directory": {"path": str(Path(file["filename"]).parent)}}


def _source(folder: Path, kind: str, name: str) -> Config:
    return {
        "path_config_source": {
            "path": str(folder / kind / f"{name}.json"),
            "watched_directory": {"path": str(folder / kind)},
        },
        "resource_api_version": "V3",
    }


def _replace(path: Path, text: str) -> None:
    """Write a file by a rename, which Envoy sees and never sees half done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.rename(new, path)

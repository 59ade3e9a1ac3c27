"""Rendering the chart with the real helm, and finding what a test wants in the result."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "search-foundation"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
HELM = Path(sys.executable).parent / "helm"

Values = Mapping[str, Any]
Manifest = dict[str, Any]

THREE_POOLS: list[Manifest] = [
    {"name": "text", "capability": ["embed", "rerank"], "models": ["all-MiniLM-L6-v2"]},
    {"name": "classify", "capability": "classify", "models": ["all-MiniLM-L6-v2"]},
    {"name": "batch", "capability": "batch", "models": ["all-MiniLM-L6-v2"]},
]
"""Pools of a rendering whose values name none, so that there is a workload of each kind."""

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
"""Kinds that make pods from a template."""

_APIS = ("keda.sh/v1alpha1", "monitoring.coreos.com/v1", "cert-manager.io/v1")


class RefusedError(Exception):
    """Helm refused the values; the text is what the operator reads."""


class Release:
    """The manifests of one rendering."""

    def __init__(self, manifests: list[Manifest], name: str) -> None:
        self.manifests = manifests
        self.name = name

    def all(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        """Names of the objects of a kind, without the release's prefix."""
        return {m["metadata"]["name"].removeprefix(f"{self.name}-") for m in self.all(kind)}

    def one(self, kind: str, name: str) -> Manifest:
        """The object of that kind and name; the release's prefix may be left out."""
        found = [m for m in self.all(kind) if m["metadata"]["name"] in (name, f"{self.name}-{name}")]
        assert len(found) == 1, f"{len(found)} objects {kind} {name}; there are {sorted(self.names(kind))}"
        return found[0]

    def workload(self, name: str) -> Manifest:
        """The Deployment or StatefulSet of that name."""
        kind = "StatefulSet" if name in self.names("StatefulSet") else "Deployment"
        return self.one(kind, name)

    def pod(self, name: str) -> Manifest:
        """Pod spec of a workload."""
        return self.workload(name)["spec"]["template"]["spec"]

    def serve(self, name: str) -> Manifest:
        """The serving container of a pool."""
        return container(self.pod(name), "serve")

    def environment(self, name: str) -> dict[str, str]:
        """ConfigMap of a pool."""
        return self.one("ConfigMap", name)["data"]

    def topology(self) -> dict[str, Any]:
        """What the gateway is told."""
        return yaml.safe_load(self.one("ConfigMap", "gateway")["data"]["topology.yaml"])

    def pod_specs(self) -> Iterator[tuple[str, Manifest]]:
        """Every pod spec of the release with its owner's name."""
        for manifest in self.manifests:
            name = f"{manifest['kind']}/{manifest['metadata']['name']}"
            if manifest["kind"] == "Pod":
                yield name, manifest["spec"]
            elif manifest["kind"] in WORKLOADS:
                yield name, manifest["spec"]["template"]["spec"]


def container(pod: Manifest, name: str) -> Manifest:
    """A container or init container of a pod spec by its name."""
    (found,) = [c for c in [*pod["containers"], *pod.get("initContainers", [])] if c["name"] == name]
    return found


def render(
    values: Values | None = None,
    *,
    release: str = "sf",
    files: tuple[Path, ...] = (),
    flags: tuple[str, ...] = (),
) -> Release:
    """Render with these values over the defaults (and over ``files``); raises RefusedError.

    Where neither names pools there are ``THREE_POOLS``; ``defaults`` renders those of the chart.
    ``flags`` are further arguments of helm, such as those of an API server to ask, whose answers may change
    from call to call: nothing is kept of such a rendering.
    """
    pools: Values = {} if files else {"pools": THREE_POOLS}
    run = _helm_template if flags else _render
    return _release(
        run(json.dumps({**pools, **(values or {})}, sort_keys=True), release, files, flags), release
    )


def defaults() -> Release:
    """Render without any values."""
    return _release(_render("{}", "sf", (), ()), "sf")


def _release(text: str, name: str) -> Release:
    full = name if "search-foundation" in name else f"{name}-search-foundation"
    return Release(copy.deepcopy(_load(text)), full)


def refusal(values: Values, *, files: tuple[Path, ...] = (), flags: tuple[str, ...] = ()) -> str:
    """The message helm refuses these values with."""
    try:
        render(values, files=files, flags=flags)
    except RefusedError as error:
        return str(error)
    raise AssertionError(f"accepted: {json.dumps(values)}")


def _helm_template(values: str, release: str, files: tuple[Path, ...], flags: tuple[str, ...]) -> str:
    command: list[str | Path] = [HELM, "template", release, CHART, "--namespace", "search", "--values", "-"]
    for file in files:
        command[4:4] = ["--values", file]
    for api in _APIS:
        command += ["--api-versions", api]
    command += flags
    done = subprocess.run(command, input=values, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        raise RefusedError(done.stderr)
    return done.stdout


_render = cache(_helm_template)


@cache
def _load(text: str) -> list[Manifest]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, loader) if document]

"""As much of a Kubernetes API server as Helm's `lookup` asks: it tells what there is, on a loopback port."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterable
from typing import Any, Self

from tests.helm.chart import Manifest

_PLURALS = {
    "Secret": "secrets",
    "Service": "services",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Deployment": "deployments",
    "StatefulSet": "statefulsets",
    "StorageClass": "storageclasses",
}
_CLUSTER_WIDE = frozenset({"StorageClass"})
_GROUPS = {"v1": "/api/v1", "apps/v1": "/apis/apps/v1", "storage.k8s.io/v1": "/apis/storage.k8s.io/v1"}
_KINDS = {
    "v1": ("Secret", "Service", "PersistentVolumeClaim"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "storage.k8s.io/v1": ("StorageClass",),
}


class ApiServer:
    """A context that serves the objects given to ``hold``; ``flags`` are what helm needs to ask it."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0].rstrip("/")
                found = answers.answers.get(path)
                missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound"}
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(found or missing).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.hold(())

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments that make `helm template` ask this server."""
        address = f"http://127.0.0.1:{self._server.server_port}"
        return ("--dry-run=server", "--kube-apiserver", address, "--disable-openapi-validation")

    def hold(self, objects: Iterable[Manifest]) -> None:
        """Be a cluster that holds these objects and no others, as a cluster would after it applied them."""
        self.answers = {
            "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
        }
        for group, path in _GROUPS.items():
            resources = [
                {
                    "name": _PLURALS[kind],
                    "namespaced": kind not in _CLUSTER_WIDE,
                    "kind": kind,
                    "verbs": ["get"],
                }
                for kind in _KINDS[group]
            ]
            self.answers[path] = {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
        for manifest in objects:
            if (plural := _PLURALS.get(manifest["kind"])) is None:
                continue
            metadata = manifest["metadata"]
            within = "" if manifest["kind"] in _CLUSTER_WIDE else f"/namespaces/{metadata['namespace']}"
            path = f"{_GROUPS[manifest['apiVersion']]}{within}/{plural}/{metadata['name']}"
            self.answers[path] = _applied(manifest)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _applied(manifest: Manifest) -> Manifest:
    """A manifest as the API server has it once it was applied, as far as the chart looks."""
    if manifest["kind"] == "Secret" and "stringData" in manifest:
        data = {k: base64.b64encode(text.encode()).decode() for k, text in manifest["stringData"].items()}
        return {k: v for k, v in manifest.items() if k != "stringData"} | {"data": data}
    if manifest["kind"] == "PersistentVolumeClaim":
        bound = {"storageClassName": "standard"} | manifest["spec"]
        return {"status": {"phase": "Bound"}} | manifest | {"spec": bound}
    return manifest

"""What an upgrade keeps: secrets the chart made itself, asked from an API server."""

from __future__ import annotations

import base64
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import yaml

from tests.helm.chart import CHART, HELM

FULL = "sf-search-foundation"


class ApiServer(http.server.BaseHTTPRequestHandler):
    """As much of a Kubernetes API server as `lookup` asks: what there is, and Secrets."""

    secrets: ClassVar[dict[str, dict[str, str]]] = {}

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {
                "kind": "APIResourceList",
                "groupVersion": "v1",
                "resources": [{"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get"]}],
            },
        }
        name = path.removeprefix("/api/v1/namespaces/search/secrets/")
        if name in self.secrets:
            data = {key: base64.b64encode(text.encode()).decode() for key, text in self.secrets[name].items()}
            answers[path] = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": name}, "data": data}
        body = answers.get(path) or {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": "NotFound",
        }
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def cluster_with() -> Iterator[Any]:
    """Renders the chart against an API server that holds the given Secrets; returns the chart's."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ApiServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def render(secrets: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        ApiServer.secrets = secrets
        command = [HELM, "template", "sf", CHART, "--namespace", "search", "--dry-run=server"]
        command += [
            "--kube-apiserver",
            f"http://127.0.0.1:{server.server_port}",
            "--disable-openapi-validation",
        ]
        command += ["--set", "evaluation.redis.enabled=true,evaluation.postgresql.enabled=true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        manifests = [m for m in yaml.safe_load_all(done.stdout) if m and m["kind"] == "Secret"]
        return {m["metadata"]["name"]: m["stringData"] for m in manifests}

    yield render
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_upgrade_keeps_the_key_and_the_passwords(cluster_with: Any) -> None:
    first = cluster_with({})
    assert first.keys() == {f"{FULL}-{name}" for name in ("bootstrap-key", "keys", "redis", "postgresql")}
    assert cluster_with(first) == first


def test_without_a_cluster_to_ask_they_are_new(cluster_with: Any) -> None:
    first, second = cluster_with({}), cluster_with({})
    for name, key in (("bootstrap-key", "api-key"), ("redis", "password"), ("postgresql", "password")):
        assert first[f"{FULL}-{name}"][key] != second[f"{FULL}-{name}"][key]

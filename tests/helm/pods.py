"""The pods of a rendered release, run as processes of this machine.

Every pod gets a loopback address of its own, so the ports stay those of the chart; names of headless Services
become the addresses of their pods, mounts become folders, probes are asked as the kubelet asks them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helm.chart import Manifest, Release
from tests.servers import free_port

_BIN = Path(sys.executable).parent
_START_SECONDS = 180.0
_CLUSTERS = itertools.count()
_ENTRYPOINT = [str(_BIN / "search-foundation")]
_PROGRAMS = {
    "envoy": [str(_BIN / "envoy")],
    "search-foundation": _ENTRYPOINT,
    "python": [sys.executable],
}

Secrets = Mapping[str, Mapping[str, str]]


@dataclass
class Pod:
    """One replica of a workload: its address, its folder, its main process."""

    name: str
    spec: Manifest
    address: str
    folder: Path
    replace: Callable[[str], str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    process: subprocess.Popen[bytes] | None = None

    @property
    def ports(self) -> dict[str, int]:
        """Ports of the main container by name."""
        return {p["name"]: p["containerPort"] for p in self.spec["containers"][0]["ports"]}

    @property
    def log(self) -> str:
        """What its main container wrote."""
        return (self.folder / "main.log").read_text(encoding="utf-8", errors="replace")

    def ready(self) -> bool:
        """Ask the readiness probe."""
        return self._probe(self.spec["containers"][0]["readinessProbe"])

    def live(self) -> bool:
        """Ask the liveness probe."""
        return self._probe(self.spec["containers"][0]["livenessProbe"])

    def stop(self) -> int:
        """End it as the kubelet does: preStop hook, SIGTERM, and SIGKILL after the grace period."""
        assert self.process is not None
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        hook = self.spec["containers"][0].get("lifecycle", {}).get("preStop")
        if hook is not None:
            command = [self.replace(word) for word in hook["exec"]["command"]]
            program = _PROGRAMS.get(command[0], [command[0]])
            subprocess.run(
                [*program, *command[1:]],
                env=self.environment,
                cwd=self.folder,
                timeout=self.spec["terminationGracePeriodSeconds"],
                check=True,
            )
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End it as a crash does."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _probe(self, probe: Manifest) -> bool:
        if "grpc" in probe:
            return self._grpc_probe(probe["grpc"], probe["timeoutSeconds"])
        get = probe["httpGet"]
        url = f"{get.get('scheme', 'HTTP').lower()}://{self.address}:{self.ports[get['port']]}{get['path']}"
        try:
            return fetch_status(url, probe["timeoutSeconds"]) == HTTPStatus.OK
        except OSError:
            return False

    def _grpc_probe(self, probe: Manifest, timeout: float) -> bool:
        with grpc.insecure_channel(f"{self.address}:{probe['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe.get("service", ""))
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
            except grpc.RpcError:
                return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


class Cluster:
    """Runs the pods of a release; a context manager that ends them all.

    ``secrets`` are those the operator made; ``files`` are put into a folder of every pod that mounts it.
    """

    def __init__(self, release: Release, folder: Path, *, secrets: Secrets | None = None) -> None:
        self.release = release
        self.pods: dict[str, list[Pod]] = {}
        self._folder = folder
        self._secrets: dict[str, Mapping[str, str]] = dict(secrets or {})
        for secret in release.all("Secret"):
            self._secrets[secret["metadata"]["name"]] = secret["stringData"]
        # Addresses of this cluster's own, so that two on one machine do not meet.
        self._network = f"127.{64 + os.getpid() % 128}.{(os.getpid() // 128 + 61 * next(_CLUSTERS)) % 250}"
        self._admin_port = str(free_port())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for pods in self.pods.values():
            for pod in pods:
                if pod.process is not None and pod.process.poll() is None:
                    pod.kill()

    def run(self, *, replicas: Mapping[str, int] | None = None) -> None:
        """Start every pod and wait until all are ready. Gateways last: they need the pools' addresses."""
        prefix = f"{self.release.name}-"
        workloads = [*self.release.all("Deployment"), *self.release.all("StatefulSet")]
        workloads.sort(key=lambda w: w["metadata"]["name"] == f"{prefix}gateway")
        for workload in workloads:
            name = workload["metadata"]["name"].removeprefix(prefix)
            count = (replicas or {}).get(name, workload["spec"].get("replicas", 1))
            self.pods[name] = [self._pod(name, workload, index) for index in range(count)]
        for pods in self.pods.values():
            for pod in pods:
                self.start(pod)
        for pods in self.pods.values():
            for pod in pods:
                self.wait_ready(pod)
        self.wait_healthy()

    def upgrade(self, release: Release) -> None:
        """Give every pod the template of a further revision, which counts from its next start."""
        self.release = release
        for name, pods in self.pods.items():
            for pod in pods:
                pod.spec = release.pod(name)

    def wait_healthy(self) -> None:
        """Wait until every gateway counts every pod of every pool as healthy."""
        deadline = time.monotonic() + _START_SECONDS
        for gateway in self.pods["gateway"]:
            while not self._sees_all(gateway):
                assert time.monotonic() < deadline, f"{gateway.name} misses pods: {gateway.log[-3000:]}"
                time.sleep(0.1)

    def _sees_all(self, gateway: Pod) -> bool:
        statistics = fetch(f"http://{gateway.address}:9090/stats/prometheus")
        healthy = dict(
            re.findall(r'envoy_cluster_membership_healthy{envoy_cluster_name="([^"]+)"} (\d+)', statistics)
        )
        pools = yaml.safe_load(self.release.one("ConfigMap", "gateway")["data"]["topology.yaml"])["pools"]
        return all(int(healthy[pool["name"]]) == len(self.pods[pool["name"]]) for pool in pools)

    def start(self, pod: Pod) -> None:
        """Run the init containers to their end, then start the main container."""
        for container in pod.spec.get("initContainers", []):
            done = subprocess.run(
                self._command(pod, container),
                env=self._environment(pod, container),
                cwd=pod.folder,
                capture_output=True,
                text=True,
                timeout=_START_SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{pod.name}/{container['name']}: {done.stdout}{done.stderr}"
        container = pod.spec["containers"][0]
        pod.environment = self._environment(pod, container)
        with (pod.folder / "main.log").open("ab") as log:
            pod.process = subprocess.Popen(
                self._command(pod, container),
                env=pod.environment,
                cwd=pod.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, pod: Pod) -> None:
        """Wait for the readiness probe."""
        assert pod.process is not None
        deadline = time.monotonic() + _START_SECONDS
        while pod.process.poll() is not None or not pod.ready():
            assert pod.process.poll() is None, f"{pod.name} ended: {pod.log[-3000:]}"
            assert time.monotonic() < deadline, f"{pod.name} is not ready: {pod.log[-3000:]}"
            time.sleep(0.1)

    def run_test_pod(self) -> str:
        """Run the pod of `helm test`; returns what it printed."""
        manifest = self.release.one("Pod", "test")
        pod = self._new_pod("test", manifest["spec"], 0)
        container = pod.spec["containers"][0]
        done = subprocess.run(
            self._command(pod, container),
            env=self._environment(pod, container) | {"PATIENCE_SECONDS": "10"},
            cwd=pod.folder,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def secret(self, name: str, key: str) -> str:
        """An entry of a Secret, whose name may lack the release's prefix."""
        entries = self._secrets.get(name) or self._secrets[f"{self.release.name}-{name}"]
        return entries[key]

    def _pod(self, name: str, workload: Manifest, index: int) -> Pod:
        return self._new_pod(name, workload["spec"]["template"]["spec"], index)

    def _new_pod(self, name: str, spec: Manifest, index: int) -> Pod:
        number = sum(len(pods) for pods in self.pods.values()) + index + 2
        folder = self._folder / f"{name}-{index}"
        folder.mkdir(parents=True)
        address = f"{self._network}.{number}"
        mounts = self._mount(spec, folder)
        pod = Pod(f"{name}-{index}", spec, address, folder, lambda text: self._replace(text, address, mounts))
        self._write_volumes(pod)
        return pod

    def _mount(self, spec: Manifest, folder: Path) -> dict[str, Path]:
        """Where each mount path is on this machine, longest first."""
        found: dict[str, Path] = {}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for mount in container.get("volumeMounts", []):
                place = folder / mount["name"]
                found[mount["mountPath"]] = place / mount["subPath"] if "subPath" in mount else place
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def _write_volumes(self, pod: Pod) -> None:
        for volume in pod.spec.get("volumes", []):
            place = pod.folder / volume["name"]
            if "hostPath" in volume:
                place.symlink_to(volume["hostPath"]["path"])
                continue
            place.mkdir(exist_ok=True)
            entries: Mapping[str, str] = {}
            if "configMap" in volume:
                entries = self.release.one("ConfigMap", volume["configMap"]["name"])["data"]
            elif "secret" in volume:
                entries = self._secrets[volume["secret"]["secretName"]]
            for key, text in entries.items():
                text = self._resolve(text) if key == "topology.yaml" else text
                (place / key).write_text(pod.replace(text), encoding="utf-8")

    def _resolve(self, topology: str) -> str:
        """Put the pods' addresses where a headless Service's name is."""
        document: dict[str, Any] = yaml.safe_load(topology)
        for pool in document["pools"]:
            (name,) = pool["addresses"]
            host, _, port = name.rpartition(":")
            workload = host.split(".")[0].removeprefix(f"{self.release.name}-")
            pool["addresses"] = [f"{pod.address}:{port}" for pod in self.pods[workload]]
            if "services_tls" in document:
                document["services_tls"]["server_name"] = host
        return yaml.safe_dump(document)

    def _replace(self, text: str, address: str, mounts: Mapping[str, Path]) -> str:
        paths = "|".join(map(re.escape, mounts))
        # One pass, since the folders here may themselves lie under a path such as /tmp.
        if paths:
            text = re.sub(rf"(?<![\w./-])({paths})(?![\w.-])", lambda m: str(mounts[m[1]]), text)
        # The address of everywhere, and not the end of a network such as 10.0.0.0/8.
        text = re.sub(r"(?<![\d.])0\.0\.0\.0(?![\d.])", address, text).replace("9901", self._admin_port)
        for service in self.release.all("Service"):
            name = service["metadata"]["name"]
            host = f"{name}.{service['metadata']['namespace']}.svc.cluster.local"
            if host not in text or "topology" in text:
                continue
            target = self._first_pod(service)
            for port in service["spec"]["ports"]:
                address = f"{target.address}:{target.ports[port['targetPort']]}"
                text = text.replace(f"{host}:{port['port']}", address)
        return text

    def _first_pod(self, service: Manifest) -> Pod:
        component = service["spec"]["selector"]
        name = component.get("search-foundation/pool", component["app.kubernetes.io/component"])
        return self.pods[name][0]

    def _command(self, pod: Pod, container: Manifest) -> list[str]:
        words = [pod.replace(word) for word in container.get("args", [])]
        if "command" not in container:
            return [*_ENTRYPOINT, *words]
        command: list[str] = container["command"]
        rest = command[1:] if command[0] == "python" else [pod.replace(word) for word in command[1:]]
        return [*_PROGRAMS[command[0]], *rest, *words]

    def _environment(self, pod: Pod, container: Manifest) -> dict[str, str]:
        found: dict[str, str] = {"LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1"}
        found |= environment(self.release, self._secrets, pod.name, container)
        return {name: pod.replace(value) for name, value in found.items()} | {"PATH": os.environ["PATH"]}


def environment(release: Release, secrets: Secrets, pod_name: str, container: Manifest) -> dict[str, str]:
    """Environment of a container as the kubelet makes it."""
    found = dict[str, str]()
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= release.one("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            found |= secrets[source["secretRef"]["name"]]
    for entry in container.get("env", []):
        origin = entry.get("valueFrom", {})
        if "secretKeyRef" in origin:
            reference = origin["secretKeyRef"]
            found[entry["name"]] = secrets[reference["name"]][reference["key"]]
        elif "resourceFieldRef" in origin:
            found[entry["name"]] = str(_cores(container["resources"]["requests"]["cpu"]))
        elif "fieldRef" in origin:
            assert origin["fieldRef"]["fieldPath"] == "metadata.name"
            found[entry["name"]] = pod_name
        else:
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], entry["value"])
    return found


def call(url: str, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """POST JSON; returns status and JSON body. Raises OSError when there is no answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=100, context=_unverified()) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


def run_batch(url: str, headers: Mapping[str, str], lines: int = 5) -> list[str]:
    """Run a batch job to its end; returns the ids of its output's lines."""
    body = [{"custom_id": f"line-{i}", "body": {"input": f"text {i}"}} for i in range(lines)]
    status, job = call(f"{url}/v1/batch/embeddings", {"model": "all-MiniLM-L6-v2", "input": body}, headers)
    assert status in (200, 201, 202), job
    until = time.monotonic() + 60
    while job["status"] in ("pending", "processing"):
        assert time.monotonic() < until, job
        time.sleep(0.1)
        job = json.loads(fetch(f"{url}/v1/batch/{job['batch_id']}", headers))
    assert job["status"] == "completed", job
    output = fetch(f"{url}/v1/batch/{job['batch_id']}/output", headers).splitlines()
    return [json.loads(line)["custom_id"] for line in output]


def fetch(url: str, headers: Mapping[str, str] | None = None) -> str:
    """GET a text."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=100, context=_unverified()) as response:
        return response.read().decode()


def fetch_status(url: str, timeout: float) -> int:
    """GET and give the status. Raises OSError when there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=timeout, context=_unverified()) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def _cores(quantity: str) -> int:
    """Cores as the downward API rounds them with a divisor of 1."""
    text = str(quantity)
    return math.ceil(int(text[:-1]) / 1000) if text.endswith("m") else math.ceil(float(text))


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context

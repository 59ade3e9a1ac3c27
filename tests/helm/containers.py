"""The pods of a rendered release, run as containers by podman: what a kubelet and a node's network would do.

Every pod has a network namespace on a bridge without a way out, and its containers have the user,
capabilities, file systems and limits of its spec. A name server answers for Services with the pods that are
ready, and a proxy stands at the address of those that have one. Needs root; this machine's own network gets
one interface to the bridge, which leaves with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.docker import image
from tests.helm.chart import REPOSITORY, Manifest, Release
from tests.helm.pods import Pod, Secrets, environment

PROGRAMS = ("podman", "conmon", "ip", "debootstrap")
"""What must be installed, beside ``runc`` or ``crun``."""
PYTHON_IMAGE = "localhost/python:3.11-bookworm"
_NAMES = itertools.count()
_START_SECONDS = 300.0
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def size(quantity: str) -> int:
    """Bytes of a quantity such as ``256Mi``."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


class Engine:
    """Podman with a store of its own, on machines that give it neither systemd nor CAP_SYS_RESOURCE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Without CAP_SYS_RESOURCE no limit can be raised, and podman's own children have lower ones.
        limits = list[str]()
        for name, kind, wanted in (
            ("nofile", resource.RLIMIT_NOFILE, 16384),
            ("nproc", resource.RLIMIT_NPROC, 4096),
        ):
            _, most = resource.getrlimit(kind)
            limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
            limits.append(f"{name}={limit}:{limit}")
        # Version 1 of cgroups is more than the crun of Debian 12 takes.
        runtime = "runc" if shutil.which("runc") else "crun"
        (folder / "containers.conf").write_text(
            f"[containers]\ndefault_ulimits = {json.dumps(limits)}\nlog_driver = 'k8s-file'\n"
            f"[engine]\nruntime = '{runtime}'\ncgroup_manager = 'cgroupfs'\nevents_logger = 'file'\n",
            encoding="utf-8",
        )

    def command(self, *words: str | Path) -> list[str]:
        """The command line of podman with these words."""
        store = ["--root", self.folder / "store", "--runroot", self.folder / "run"]
        return [str(word) for word in ("podman", *store, *words)]

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """Begin a command, whose output is one text."""
        return subprocess.Popen(
            self.command(*words),
            env=os.environ | {"CONTAINERS_CONF": str(self.folder / "containers.conf")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
        )

    def run(self, *words: str | Path, seconds: float = 120) -> tuple[int, str]:
        """Run a command to its end; returns its status and all that it wrote."""
        process = self.start(*words)
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, text

    def ask(self, *words: str | Path, seconds: float = 120) -> str:
        """Run a command that must succeed; returns what it wrote."""
        status, text = self.run(*words, seconds=seconds)
        assert status == 0, f"podman {' '.join(map(str, words))}: {text[-6000:]}"
        return text

    def base(self, root: Path) -> None:
        """Make the image that stands for the official Python one from a root of Debian, once."""
        if self.run("image", "exists", PYTHON_IMAGE)[0] != 0:
            archive = self.folder / "base.tar"
            subprocess.run(["tar", "--create", "--file", archive, "--directory", root, "."], check=True)
            self.ask("import", archive, PYTHON_IMAGE, seconds=600)
            archive.unlink()

    def build(self, target: str, tag: str) -> tuple[int, str]:
        """Build a target of the Dockerfile; its steps are lent the package indexes of this machine's pip."""
        lent = [path for path in image.lent() if path != Path("/etc/resolv.conf")]
        return self.run(
            "build",
            *("--network", "host"),
            *(word for path in lent for word in ("--volume", f"{path}:{path}:ro")),
            *("--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}"),
            *("--ignorefile", image.DOCKER / "Dockerfile.dockerignore"),
            *("--file", image.DOCKER / "Dockerfile", "--target", target, "--tag", tag),
            REPOSITORY,
            seconds=3000,
        )


class Network:
    """A bridge in a namespace of its own, namespaces of pods on it, and this machine's one address there."""

    def __init__(self) -> None:
        number, own = os.getpid(), next(_NAMES)
        self._prefix = f"10.{100 + number % 100}.{(number // 100 + own) % 250}"
        self._name = f"sf{number % 100000}-{own}"
        self._addresses = (f"{self._prefix}.{last}" for last in range(2, 200))
        self._services = (f"{self._prefix}.{last}" for last in range(200, 254))
        self._namespaces = [f"{self._name}-bridge"]
        self.host = f"{self._prefix}.1"
        _ip("netns", "add", self._namespaces[0])
        self._inside("link", "add", "bridge", "type", "bridge")
        self._inside("link", "set", "bridge", "up")
        _ip("link", "add", self._name, "type", "veth", "peer", "name", "host", "netns", self._namespaces[0])
        self._inside("link", "set", "host", "master", "bridge", "up")
        self._own(self.host)

    def pod(self, name: str) -> tuple[Path, str]:
        """A namespace for a pod and its address; it reaches other pods and this machine, and nothing else."""
        namespace, address = f"{self._name}-{name}", next(self._addresses)
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        port = f"pod{address.rpartition('.')[2]}"
        self._inside("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._inside("link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        return Path("/run/netns", namespace), address

    def service(self) -> str:
        """An address for a Service, which is this machine's."""
        address = next(self._services)
        self._own(address)
        return address

    def close(self) -> None:
        """Take everything away."""
        for namespace in reversed(self._namespaces):
            _ip("netns", "del", namespace)

    def _own(self, address: str) -> None:
        _ip("addr", "add", f"{address}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")

    def _inside(self, *words: str) -> None:
        _ip("-n", self._namespaces[0], *words)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class NameServer(threading.Thread):
    """Answers for addresses of IPv4 with what ``find`` tells of a name; None is a name that is not."""

    def __init__(self, host: str, find: Callable[[str], list[str] | None]) -> None:
        super().__init__(daemon=True)
        self._find = find
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 53))
        self.start()

    def run(self) -> None:
        while True:
            question, caller = self._socket.recvfrom(4096)
            if not caller[1] or len(question) < 12:
                return
            self._socket.sendto(self._answer(question), caller)

    def close(self) -> None:
        """End it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self.join()
        self._socket.close()

    def _answer(self, question: bytes) -> bytes:
        labels, place = list[str](), 12
        while length := question[place]:
            labels.append(question[place + 1 : place + 1 + length].decode())
            place += 1 + length
        asked = question[12 : place + 5]
        (kind,) = struct.unpack_from("!H", question, place + 1)
        found = self._find(".".join(labels).lower())
        addresses = found or [] if kind == 1 else []
        head = struct.pack("!HHHHHH", *struct.unpack_from("!H", question), 0, 1, len(addresses), 0, 0)
        flags = 0x8580 | (3 if found is None else 0)  # an answer with authority, or "no such name"
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 2, 4) + socket.inet_aton(address)
            for address in addresses
        )
        return head[:2] + struct.pack("!H", flags) + head[4:] + asked + records


class Proxy(threading.Thread):
    """Stands at the addresses of Services; each connection goes to the next pod that is ready."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._loop = asyncio.new_event_loop()
        self._servers = list[asyncio.Server]()
        self.start()

    def run(self) -> None:
        self._loop.run_forever()

    def listen(self, address: str, port: int, choose: Callable[[], tuple[str, int] | None]) -> None:
        """Serve an address; ``choose`` names the pod's for a connection, None when there is none."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            chosen = choose()
            if chosen is None:
                writer.close()
                return
            try:
                inner_reader, inner_writer = await asyncio.open_connection(*chosen)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))

        start = asyncio.start_server(accept, address, port)
        self._servers.append(asyncio.run_coroutine_threadsafe(start, self._loop).result(30))

    def close(self) -> None:
        """End it and every connection."""

        async def end() -> None:
            for server in self._servers:
                server.close()
            mine = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()
        self._loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the other end left; so does this one
    finally:
        writer.close()


@dataclass
class ContainerPod(Pod):
    """One pod: its containers, and whether its Service sends it calls."""

    engine: Engine = field(kw_only=True)
    labels: Mapping[str, str] = field(kw_only=True)
    namespace: Path = field(kw_only=True)
    in_service: bool = False

    @property
    def main(self) -> str:
        """Name of its main container."""
        return self.container(self.spec["containers"][0])

    @property
    def log(self) -> str:
        return self.engine.run("logs", self.main)[1]

    def container(self, spec: Manifest) -> str:
        """Podman's name for a container of it."""
        return f"{self.namespace.name}-{spec['name']}"

    def status(self) -> Manifest:
        """What podman tells of the main container's state."""
        return json.loads(self.engine.ask("inspect", self.main))[0]["State"]

    def stop(self) -> int:
        """End it as the kubelet does: out of its Service, preStop, SIGTERM, SIGKILL after its grace."""
        self.in_service = False
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        main, *others = self.spec["containers"]
        grace = str(self.spec["terminationGracePeriodSeconds"])
        ending = [self.engine.start("stop", "--time", grace, self.container(other)) for other in others]
        hook = main.get("lifecycle", {}).get("preStop")
        if hook is not None:
            self.engine.ask("exec", self.main, *hook["exec"]["command"], seconds=float(grace))
        left = max(1, round(deadline - time.monotonic()))
        self.engine.ask("stop", "--time", str(left), self.main, seconds=left + 60)
        for process in ending:
            text, _ = process.communicate(timeout=120)
            assert process.returncode == 0, text
        return self.status()["ExitCode"]

    def kill(self) -> None:
        self.in_service = False
        for spec in self.spec["containers"]:
            self.engine.run("kill", self.container(spec))

    def inside(self, *command: str) -> str:
        """Run a command in the main container; returns all that it wrote, whatever its status."""
        return self.engine.run("exec", self.main, *command)[1]


class Node:
    """Runs the pods of a release by podman; a context manager that ends them all."""

    def __init__(
        self, engine: Engine, release: Release, folder: Path, secrets: Secrets | None = None
    ) -> None:
        self.release = release
        self.pods: dict[str, list[ContainerPod]] = {}
        self._engine, self._folder = engine, folder
        self._secrets: dict[str, Mapping[str, str]] = dict(secrets or {})
        self._count = itertools.count()
        self._network = Network()
        self._names = NameServer(self._network.host, self._find)
        self._proxy = Proxy()
        self._addresses: dict[str, str] = {}
        self._turn = itertools.count()
        for service in release.all("Service"):
            if service["spec"].get("clusterIP") != "None":
                self._expose(service)
        self._remember(release)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.run("rm", "--all", "--force", "--time", "0")
        self._proxy.close()
        self._names.close()
        self._network.close()

    def address(self, service: str) -> str:
        """The address of a Service, whose name may lack the release's prefix."""
        return self._addresses[f"{self.release.name}-{service}"]

    def secret(self, name: str, key: str) -> str:
        """An entry of a Secret, whose name may lack the release's prefix."""
        return self._secrets[f"{self.release.name}-{name}"][key]

    def run(self) -> None:
        """Start every pod and wait until all are ready."""
        prefix = f"{self.release.name}-"
        workloads = [*self.release.all("StatefulSet"), *self.release.all("Deployment")]
        for workload in workloads:
            name = workload["metadata"]["name"].removeprefix(prefix)
            stays = workload["kind"] == "StatefulSet"
            for index in range(workload["spec"].get("replicas", 1)):
                self.pods.setdefault(name, []).append(self.start(name, f"{name}-{index}" if stays else None))
        for pod in itertools.chain.from_iterable(self.pods.values()):
            self.wait_ready(pod)

    def upgrade(self, release: Release) -> None:
        """Take a further revision; running pods keep their specs and get new files of ConfigMaps."""
        self.release = release
        self._remember(release)
        for pod in itertools.chain.from_iterable(self.pods.values()):
            self._project(pod)

    def roll(self, name: str) -> list[int]:
        """Replace a Deployment's pods, each before the old one ends; returns what those exited with."""
        strategy = self.release.workload(name)["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
        ended: list[int] = []
        for old in list(self.pods[name]):
            new = self.start(name)
            self.pods[name].append(new)
            self.wait_ready(new)
            ended.append(old.stop())
            self.pods[name].remove(old)
        return ended

    def start(self, name: str, pod_name: str | None = None) -> ContainerPod:
        """Make a pod of a workload, run its init containers to their end, and start the others."""
        template = self.release.workload(name)["spec"]["template"]
        pod = self._new(pod_name or f"{name}-{next(self._count):05x}", template)
        self._start(pod)
        return pod

    def restart(self, pod: ContainerPod) -> None:
        """Start a StatefulSet's pod that ended again: its name and claims, and the template of now."""
        for spec in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            self._engine.ask("rm", "--force", pod.container(spec))
        pod.spec = self.release.pod(pod.name.rpartition("-")[0])
        self._provide(pod)
        self._start(pod)
        self.wait_ready(pod)

    def wait_ready(self, pod: ContainerPod) -> None:
        """Wait for the readiness probe; then its Service sends it calls."""
        deadline = time.monotonic() + _START_SECONDS
        while not pod.ready():
            assert pod.status()["Running"], f"{pod.name} ended: {pod.log[-3000:]}"
            assert time.monotonic() < deadline, f"{pod.name} is not ready: {pod.log[-3000:]}"
            time.sleep(0.2)
        pod.in_service = True

    def run_test_pod(self) -> str:
        """Run the pod of `helm test`; returns what it wrote."""
        manifest = self.release.one("Pod", "test")
        pod = self._new("test", {"metadata": manifest["metadata"], "spec": manifest["spec"]})
        return self._engine.ask(*self._words(pod, pod.spec["containers"][0], "--rm"), seconds=_START_SECONDS)

    def _expose(self, service: Manifest) -> None:
        name = service["metadata"]["name"]
        self._addresses[name] = self._network.service()
        for port in service["spec"]["ports"]:

            def choose(target: str = port["targetPort"]) -> tuple[str, int] | None:
                ready = self._behind(service)
                if not ready:
                    return None
                pod = ready[next(self._turn) % len(ready)]
                return pod.address, pod.ports[target]

            self._proxy.listen(self._addresses[name], port["port"], choose)

    def _find(self, host: str) -> list[str] | None:
        for service in self.release.all("Service"):
            name = service["metadata"]["name"]
            if host == f"{name}.{service['metadata']['namespace']}.svc.cluster.local":
                fixed = self._addresses.get(name)
                return [fixed] if fixed else [pod.address for pod in self._behind(service)]
        return None

    def _behind(self, service: Manifest) -> list[ContainerPod]:
        wanted = service["spec"]["selector"].items()
        every = list(itertools.chain.from_iterable(list(self.pods.values())))
        return [pod for pod in every if pod.in_service and wanted <= pod.labels.items()]

    def _remember(self, release: Release) -> None:
        for secret in release.all("Secret"):
            # helm keeps what it made at the first install
            self._secrets.setdefault(secret["metadata"]["name"], secret["stringData"])

    def _new(self, name: str, template: Manifest) -> ContainerPod:
        namespace, address = self._network.pod(name)
        folder = self._folder / namespace.name
        folder.mkdir(parents=True)
        pod = ContainerPod(
            name,
            template["spec"],
            address,
            folder,
            lambda text: text,
            engine=self._engine,
            labels=template["metadata"]["labels"],
            namespace=namespace,
        )
        options = {
            option["name"]: option.get("value") for option in pod.spec.get("dnsConfig", {}).get("options", [])
        }
        search = "search.svc.cluster.local svc.cluster.local cluster.local"
        (folder / "resolv.conf").write_text(
            f"nameserver {self._network.host}\nsearch {search}\noptions ndots:{options.get('ndots', 5)}\n",
            encoding="utf-8",
        )
        self._provide(pod)
        return pod

    def _provide(self, pod: ContainerPod) -> None:
        """Make the volumes of a pod that is new."""
        for volume in pod.spec.get("volumes", []):
            place = pod.folder / volume["name"]
            if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory":
                shutil.rmtree(place, ignore_errors=True)
                self._make(place, pod, 0o2777)
            elif "persistentVolumeClaim" in volume:
                self._make(self._claim(volume), pod, 0o2770)
        self._project(pod)

    def _start(self, pod: ContainerPod) -> None:
        for spec in pod.spec.get("initContainers", []):
            self._engine.ask(*self._words(pod, spec), seconds=_START_SECONDS)
        for spec in pod.spec["containers"]:
            self._engine.ask(*self._words(pod, spec, "--detach"))

    def _claim(self, volume: Manifest) -> Path:
        return self._folder / "claims" / volume["persistentVolumeClaim"]["claimName"]

    def _make(self, folder: Path, pod: ContainerPod, mode: int) -> None:
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, 0, pod.spec["securityContext"]["fsGroup"])
            folder.chmod(mode)

    def _project(self, pod: ContainerPod) -> None:
        """Write ConfigMaps and Secrets as the kubelet does: a new folder, and a link that is moved to it."""
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                (name,) = volume["configMap"].values()
                entries: Mapping[str, str] = self.release.one("ConfigMap", name)["data"]
            elif "secret" in volume:
                (name,) = volume["secret"].values()
                entries = self._secrets[name]
            else:
                continue
            place = pod.folder / volume["name"]
            new = place / f"..{time.time_ns()}"
            new.mkdir(parents=True)
            for key, text in entries.items():
                (new / key).write_text(text, encoding="utf-8")
                os.chown(new / key, 0, pod.spec["securityContext"]["fsGroup"])
                (new / key).chmod(0o640 if "secret" in volume else 0o644)
                if not (place / key).is_symlink():
                    (place / key).symlink_to(f"..data/{key}")
            (place / "..new").symlink_to(new.name)
            (place / "..new").rename(place / "..data")

    def _words(self, pod: ContainerPod, spec: Manifest, *more: str) -> list[str | Path]:
        """A container of a pod in words of podman."""
        who, limits = pod.spec["securityContext"], spec["securityContext"]
        assert who["runAsNonRoot"], who
        assert who["seccompProfile"] == {"type": "RuntimeDefault"}, who
        words: list[str | Path] = ["run", "--name", pod.container(spec), *more]
        words += ["--network", f"ns:{pod.namespace}", "--uts", "private", "--hostname", pod.name]
        words += ["--user", f"{who['runAsUser']}:{who['runAsGroup']}", "--group-add", str(who["fsGroup"])]
        words += (
            ["--cap-drop", capability] if (capability := ",".join(limits["capabilities"]["drop"])) else []
        )
        if not limits["allowPrivilegeEscalation"]:
            words += ["--security-opt", "no-new-privileges"]
        if limits["readOnlyRootFilesystem"]:
            words += ["--read-only", "--read-only-tmpfs=false"]
        bytes_ = str(size(spec["resources"]["limits"]["memory"]))
        words += ["--memory", bytes_, "--memory-swap", bytes_]
        words += ["--volume", f"{pod.folder / 'resolv.conf'}:/etc/resolv.conf:ro"]
        for name, value in environment(self.release, self._secrets, pod.name, spec).items():
            words += ["--env", f"{name}={value}"]
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for mount in spec.get("volumeMounts", []):
            words += self._mount(pod, volumes[mount["name"]], mount)
        if "command" in spec:
            words += ["--entrypoint", json.dumps(spec["command"])]
        return [*words, f"localhost/{spec['image']}", *spec.get("args", [])]

    def _mount(self, pod: ContainerPod, volume: Manifest, mount: Manifest) -> Sequence[str]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            most = size(volume["emptyDir"]["sizeLimit"])
            return [
                "--mount",
                f"type=tmpfs,tmpfs-size={most},tmpfs-mode=1777,destination={mount['mountPath']}",
            ]
        place = self._claim(volume) if "persistentVolumeClaim" in volume else pod.folder / volume["name"]
        assert "subPath" not in mount, mount
        return ["--volume", f"{place}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"]


def used(pod: ContainerPod) -> Iterator[tuple[str, int, int]]:
    """Of every volume of a pod that has a limit: its name, bytes in it, and that limit."""
    for volume in pod.spec.get("volumes", []):
        limit: Any = volume.get("emptyDir", {}).get("sizeLimit")
        place = pod.folder / volume["name"]
        if limit is not None and place.exists():
            files = [path.lstat().st_size for path in place.rglob("*") if path.is_file()]
            yield volume["name"], sum(files), size(limit)

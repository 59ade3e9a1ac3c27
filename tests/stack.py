"""The real thing on free ports: service processes and Envoy, started by the command a user runs.

For end-to-end tests and benchmarks::

    with Stack(tmp_path) as stack:
        services = stack.serve()
        stack.gateway()
        requests.post(stack.url + "/v1/embeddings", ...)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from gateway.child import ends_with_parent
from search_foundation.capabilities import CAPABILITIES
from tests.servers import free_port

MODEL = "all-MiniLM-L6-v2"
START_SECONDS = 180.0
STOP_SECONDS = 120.0


class StackError(AssertionError):
    """A process did not do what it should; the text ends with its log."""


@dataclass
class Command:
    """One run of ``search-foundation``, its output in a file. It ends when the tests are killed."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        module: str = "search_foundation.cli",
    ) -> Command:
        log = folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env={**_inherited(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ends_with_parent(),
            )
        return cls(name, process, log)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.failure(f"still runs after {seconds:g} s") from None

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                raise self.failure("did not stop on SIGTERM") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def failure(self, what: str) -> StackError:
        return StackError(f"{self.name} {what}. Its log ends:\n{self.text()[-3000:]}")

    def must_run(self) -> None:
        if self.process.poll() is not None:
            raise self.failure(f"ended with status {self.process.returncode}")


@dataclass
class Services:
    """One ``search-foundation serve`` on ports of its own."""

    command: Command
    words: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    grpc_port: int
    metrics_port: int
    models: tuple[str, ...]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def restart(self) -> None:
        """Start it again on the same ports, after its end."""
        self.command = Command.start(self.command.name, self.words, self.environment, self.folder)
        self.wait_until_serving()

    def wait_until_serving(self) -> None:
        ports = Path(self.environment["SF_PORTS_FILE"])
        wait_for(lambda: ports.exists(), self.command)


@dataclass
class Stack:
    """Processes that end with the ``with`` block. ``settings`` are SF_* variables of all of them."""

    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    services: list[Services] = field(default_factory=list)
    envoy: Command | None = None
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    admin_port: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        commands = [s.command for s in self.services]
        if self.envoy is not None:
            commands.insert(0, self.envoy)
        for command in commands:
            command.process.terminate()
        for command in commands:
            try:
                command.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                command.kill()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SF_DATA_DIR": str(self.folder / "data"),
            "SF_DRAIN_SECONDS": "0",
            # Calls are to end well on a machine that does much else, too.
            "SF_REQUEST_TIMEOUT_SECONDS": str(START_SECONDS),
            **self.settings,
        }

    def serve(
        self,
        *words: str,
        models: Sequence[str] = (MODEL,),
        module: str = "search_foundation.cli",
        **settings: str,
    ) -> Services:
        """Start a service process and wait until it serves; ``words`` are ``serve``'s, "embed" by default.

        ``module`` is run instead of the command.
        """
        grpc_port, metrics_port = free_port(), free_port()
        name = f"services-{len(self.services)}"
        environment = {
            **self.environment,
            "SF_GRPC_PORT": str(grpc_port),
            "SF_METRICS_PORT": str(metrics_port),
            "SF_PORTS_FILE": str(self.folder / f"{name}.ports"),
            "SF_MODELS": json.dumps(list(models)),
            **settings,
        }
        command_words = ("serve", *(words or ("embed",)))
        command = Command.start(name, command_words, environment, self.folder, module)
        services = Services(
            command, command_words, environment, self.folder, grpc_port, metrics_port, tuple(models)
        )
        self.services.append(services)
        services.wait_until_serving()
        return services

    def gateway(
        self, topology: Mapping[str, Any] | None = None, *, http_port: int = 0, ready: bool = True
    ) -> Command:
        """Start Envoy in front of the services; ``topology`` is put over what they make."""
        self.http_port = http_port or free_port()
        self.grpc_port, self.admin_port = free_port(), free_port()
        document: dict[str, Any] = {
            "listener": {"host": self.host, "port": self.http_port},
            "grpc_listener": {"host": self.host, "port": self.grpc_port},
            "admin": {"host": self.host, "port": self.admin_port},
            "pools": [self.pool(s, f"pool-{index}") for index, s in enumerate(self.services)],
            "health_check": {"interval": 0.5, "unhealthy_interval": 0.2},
            "timeouts": {"request": START_SECONDS},
            **(topology or {}),
        }
        path = self.folder / "topology.yaml"
        path.write_text(yaml.safe_dump(document))
        words = ("gateway", "--topology", str(path))
        environment = {**self.environment, "SF_ADMIN_PORT": str(self.admin_port)}
        self.envoy = Command.start("gateway", words, environment, self.folder)
        if ready:
            self.wait_until_ready()
        return self.envoy

    @staticmethod
    def pool(services: Services, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "capabilities": [word for word in services.words[1:] if word in CAPABILITIES],
            "models": list(services.models),
            "addresses": [services.address],
        }

    def await_listening(self) -> int:
        """Wait until the gateway takes connections; returns its port."""
        assert self.envoy is not None
        wait_for(lambda: _accepts(self.host, self.http_port), self.envoy)
        return self.http_port

    def wait_until_ready(self) -> None:
        """Wait until every pool has a healthy endpoint, as Envoy sees it."""
        assert self.envoy is not None
        wait_for(self._all_healthy, self.envoy)

    def create_key(self, *words: str) -> str:
        """Make an API key by the command; returns the key."""
        made = subprocess.run(
            [sys.executable, "-m", "search_foundation.cli", "keys", "create", *words],
            env={**_inherited(), **self.environment},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if made.returncode:
            raise StackError(f"keys create failed: {made.stderr}")
        return made.stdout.strip()

    def access_log(self) -> list[dict[str, Any]]:
        """The gateway's access log so far; Envoy writes it in intervals."""
        assert self.envoy is not None
        lines = (line for line in self.envoy.text().splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if "request_id" in entry]

    def _all_healthy(self) -> bool:
        if not _accepts(self.host, self.http_port):
            return False
        try:
            status, body = http_get(self.admin_port, "/clusters?format=json")
        except (OSError, HTTPException):
            return False
        if status != 200:
            return False
        clusters = json.loads(body).get("cluster_statuses", [])
        # A cluster of clusters has no endpoints of its own.
        of_pools = [c for c in clusters if "+" not in c["name"]]
        return bool(of_pools) and all(
            any(h["health_status"] == {"eds_health_status": "HEALTHY"} for h in c.get("host_statuses", []))
            for c in of_pools
        )


def child_of(command: Command) -> int:
    """Process id of the only process that a command has started."""
    pid = command.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def http_get(port: int, path: str) -> tuple[int, bytes]:
    """One GET on loopback."""
    connection = HTTPConnection("127.0.0.1", port, timeout=100)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_for(condition: Any, command: Command | None = None, seconds: float = START_SECONDS) -> None:
    """Poll until the condition holds; fails when time is up or the command has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if command is not None:
            command.must_run()
        if time.monotonic() > deadline:
            text = "did not get ready"
            raise command.failure(text) if command else StackError(text)
        time.sleep(0.05)


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _inherited() -> dict[str, str]:
    """Our environment without what is meant for us alone (see ``tests/conftest.py``)."""
    ours = ("SF_", "GRPC_ENABLE_FORK_SUPPORT")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}

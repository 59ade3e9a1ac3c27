"""Real gateways before hundreds of endpoints: routing, changes under traffic, churn, what it costs.

    python -m benchmarks.gateway_scale --pools 30 --endpoints 500 --models 200
    python -m benchmarks.gateway_scale --gateways 10 --checks on    # calls only, over all of them

Every gateway is an Envoy of its own; the first one has what follows the topology, too, as a pod of the chart
has, and the others the same configuration in one file. Endpoints are gRPC servers on loopback addresses of
their own that answer health and one scripted call, with the name of their pool. Every answer is compared with
where its model belongs. Prints figures of docs/sizing.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import yaml
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2

from gateway.child import ends_with_parent
from gateway.process import find_envoy
from tests.servers import free_port
from tests.stack import MODEL, Command, Stack, child_of, wait_for

_TICKS = os.sysconf("SC_CLK_TCK")
_FIRST, _MOVED = 10, 20
"""Second byte of an endpoint's address, before it moves and after."""
_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


class _Scripted(grpc.GenericRpcHandler):
    def __init__(self, pool: str) -> None:
        answer = json.dumps({"pool": pool}).encode()
        self._body = httpbody_pb2.HttpBody(content_type="application/json", data=answer).SerializeToString()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        told = _SERVING if "Health" in handler_call_details.method else self._body

        async def answer(request: bytes, context: Any) -> bytes:
            return told

        return grpc.unary_unary_rpc_method_handler(answer)


async def _serve(pools: Sequence[int], sizes: Sequence[int], port: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    kept: list[grpc.aio.Server] = []  # one that nobody holds is closed
    for pool in pools:
        for number in range(sizes[pool]):
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            server.add_generic_rpc_handlers((_Scripted(_name(pool)),))
            for second in (_FIRST, _MOVED):
                address = _address(pool, number, second, port)
                assert server.add_insecure_port(address) == port, address
            await server.start()
            kept.append(server)
    print("serving", flush=True)
    await asyncio.Event().wait()


def _name(pool: int) -> str:
    return f"pool-{pool:02}"


def _model(number: int) -> str:
    return f"model-{number:03}"


def _address(pool: int, number: int, second: int, port: int) -> str:
    return f"127.{second}.{pool}.{number + 1}:{port}"


def _sizes(pools: int, endpoints: int) -> list[int]:
    return [endpoints // pools + (pool < endpoints % pools) for pool in range(pools)]


class Scale:
    """The system under test, and where each model belongs."""

    def __init__(
        self, stack: Stack, sizes: Sequence[int], models: int, port: int, health_check: Mapping[str, Any]
    ) -> None:
        self.stack = stack
        self.sizes, self._port = sizes, port
        self.pool_of = {_model(number): _name(number % len(sizes)) for number in range(models)}
        self.moved: set[tuple[int, int]] = set()
        self.document: dict[str, Any] = {
            "pools": self._pools(),
            "access_log": None,
            "health_check": health_check,
            "workers": 1,
        }

    def _pools(self) -> list[dict[str, Any]]:
        return [
            {
                "name": _name(pool),
                "capabilities": ["embed"],
                "models": [model for model, name in self.pool_of.items() if name == _name(pool)],
                "addresses": [
                    _address(pool, n, _MOVED if (pool, n) in self.moved else _FIRST, self._port)
                    for n in range(size)
                ],
            }
            for pool, size in enumerate(self.sizes)
        ]

    def write(self) -> None:
        """Let the running gateway have the pools and endpoints as they are now."""
        path = self.stack.folder / "topology.yaml"
        document = yaml.safe_load(path.read_text()) | {"pools": self._pools()}
        new = path.with_suffix(".new")
        new.write_text(yaml.dump(document, Dumper=yaml.CSafeDumper))
        new.rename(path)


@dataclass(frozen=True)
class Gateway:
    """One Envoy: its process, and where it listens."""

    pid: int
    url: str
    admin: str

    def counted(self, name: str) -> int:
        """Sum over all clusters of a counter such as ``health_check.attempt``."""
        text = httpx.get(f"{self.admin}/stats", params={"filter": f"^cluster.*{name}$"}, timeout=60).text
        return sum(int(line.rsplit(" ", 1)[1]) for line in text.splitlines())


class Callers:
    """Threads that call models in turn, over gateways in turn, and compare who answers."""

    def __init__(self, scale: Scale, gateways: Sequence[Gateway], threads: int = 4) -> None:
        self.calls, self.wrong = 0, list[str]()
        self._models = tuple(scale.pool_of.items())
        self._urls = [f"{gateway.url}/v1/embeddings" for gateway in gateways]
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i, threads)) for i in range(threads)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self, first: int, step: int) -> None:
        with httpx.Client(timeout=60) as client:
            number = first
            while not self._end.is_set():
                model, pool = self._models[number % len(self._models)]
                # The next gateway after each round of the models, so that every one is asked for every model.
                url = self._urls[(number + number // len(self._models)) % len(self._urls)]
                number += step
                try:
                    answer = client.post(url, json={"model": model, "input": "a"})
                    right = answer.status_code == 200 and answer.json()["pool"] == pool
                    text = answer.text
                except httpx.HTTPError as error:
                    right, text = False, repr(error)
                self.calls += 1
                if not right:
                    self.wrong.append(f"{model}: {text[:200]}")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _memory(pid: int) -> str:
    kib = next(
        int(row.split()[1]) for row in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in row
    )
    return f"{kib / 1024:.0f} MiB"


def _who(scale: Scale, model: str) -> str:
    answer = httpx.post(f"{scale.stack.url}/v1/embeddings", json={"model": model, "input": "a"}, timeout=60)
    return answer.json().get("pool", "") if answer.status_code == 200 else ""


@contextmanager
def _endpoints(sizes: Sequence[int], port: int, processes: int) -> Generator[None]:
    command = [sys.executable, "-m", "benchmarks.gateway_scale", "--serve", "--port", str(port)]
    command += ["--pools", str(len(sizes)), "--endpoints", str(sum(sizes)), "--processes", str(processes)]
    running = [
        subprocess.Popen(
            [*command, "--part", str(part)], stdout=subprocess.PIPE, preexec_fn=ends_with_parent()
        )
        for part in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"serving\n"
        yield
    finally:
        for process in running:
            process.terminate()
            process.wait()


@contextmanager
def _further(scale: Scale, number: int) -> Generator[Gateway]:
    """One more Envoy of the same topology, from one file: of those that watch files a machine bears few.

    Each pool's endpoints are a watch of their own, and Linux gives a user 128 of them.
    """
    topology, ports = scale.stack.folder / f"gateway-{number}.yaml", (free_port(), free_port(), free_port())
    config = topology.with_suffix(".envoy.yaml")
    document = yaml.safe_load((scale.stack.folder / "topology.yaml").read_text())
    for name, port in zip(("listener", "grpc_listener", "admin"), ports, strict=True):
        document[name]["port"] = port
    topology.write_text(yaml.dump(document, Dumper=yaml.CSafeDumper))
    command = [sys.executable, "-m", "search_foundation.cli", "gateway"]
    environment = os.environ | scale.stack.environment
    subprocess.run([*command, "--topology", topology, "--render", config], env=environment, check=True)
    envoy = [find_envoy(), "--config-path", config, "--concurrency", "1", "--log-level", "error"]
    process = subprocess.Popen([*envoy, "--disable-hot-restart"], preexec_fn=ends_with_parent())
    try:
        gateway = Gateway(process.pid, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}")
        wait_for(lambda: process.poll() is not None or _sees(gateway, sum(scale.sizes)))
        assert process.poll() is None, f"Envoy ended with status {process.returncode}"
        yield gateway
    finally:
        process.terminate()
        process.wait()


def _sees(gateway: Gateway, endpoints: int) -> bool:
    try:
        return gateway.counted("membership_healthy") >= endpoints
    except httpx.HTTPError:
        return False  # it does not listen yet


def _measure(arguments: argparse.Namespace, *, checks: bool) -> Iterator[tuple[str, str]]:
    sizes = _sizes(arguments.pools, arguments.endpoints)
    with (
        tempfile.TemporaryDirectory() as folder,
        _endpoints(sizes, port := free_port(), arguments.processes),
        ExitStack() as more,
    ):
        # Names of models without weights: aliases, which may have pools of their own.
        names = [_model(number) for number in range(arguments.models + 5)]
        catalog = Path(folder) / "catalog.yaml"
        catalog.write_text(yaml.safe_dump({"aliases": dict.fromkeys(names, MODEL)}))
        stack = more.enter_context(Stack(Path(folder), {"SF_CATALOG_FILE": str(catalog)}))
        # The endpoints here share this machine's cores: they may take their time.
        every: float = arguments.interval
        health_check = {"active": checks, "interval": every, "timeout": max(3.0, every / 2)}
        scale = Scale(stack, sizes, arguments.models, port, health_check)
        command = stack.gateway(scale.document)
        first = Gateway(child_of(command), stack.url, f"http://127.0.0.1:{stack.admin_port}")
        gateways = [first]
        gateways += [more.enter_context(_further(scale, n)) for n in range(1, arguments.gateways)]
        yield from _calls(scale, gateways, command, arguments.calls)
        if arguments.gateways == 1:
            yield from _changes(scale, first, command, names[arguments.models :])


def _calls(
    scale: Scale, gateways: Sequence[Gateway], command: Command, calls: int
) -> Iterator[tuple[str, str]]:
    """What gateways cost at rest and by call, and whether every call comes where it belongs."""
    follower, count = command.process.pid, len(gateways)

    def total(name: str) -> int:
        return sum(gateway.counted(name) for gateway in gateways)

    used, asked, failed = _used(gateways), total("health_check.attempt"), total("health_check.failure")
    begun = time.monotonic()
    time.sleep(10)
    took = time.monotonic() - begun
    yield "a gateway at rest, share of a core", f"{(_used(gateways) - used) / took / count:.3f}"
    asked, failed = total("health_check.attempt") - asked, total("health_check.failure") - failed
    yield "health checks of all gateways a second, failed", f"{asked / took:.0f}, {failed / took:.0f}"
    memory = ", ".join(sorted({_memory(gateway.pid) for gateway in gateways}))
    yield "memory at rest: Envoy, follower", f"{memory}; {_memory(follower)}"
    yield "inotify instances of the first Envoy", str(_watches(gateways[0].pid))
    with Callers(scale, gateways) as callers:
        used = _used(gateways)
        wait_for(lambda: callers.calls >= calls, command)
        used = _used(gateways) - used
    yield "calls, wrong", f"{callers.calls}, {len(callers.wrong)}"
    yield "Envoy's CPU a call", f"{1e6 * used / callers.calls:.0f} us"
    assert not callers.wrong, callers.wrong[:3]


def _watches(pid: int) -> int:
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as connections of checks are
            count += "inotify" in os.readlink(path)
    return count


def _used(gateways: Sequence[Gateway]) -> float:
    return sum(_cpu_seconds(gateway.pid) for gateway in gateways)


def _changes(
    scale: Scale, gateway: Gateway, command: Command, names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Models added and endpoints moved under traffic."""
    follower, last = command.process.pid, _name(len(scale.sizes) - 1)
    with Callers(scale, [gateway]) as callers:
        seconds: list[float] = []
        for extra in names:
            scale.pool_of[extra] = last
            begun = time.monotonic()
            scale.write()
            wait_for(lambda model=extra: _who(scale, model) == last, command)
            seconds.append(time.monotonic() - begun)
    yield "model added under traffic, s until it is answered", ", ".join(f"{s:.2f}" for s in seconds)
    yield "calls meanwhile, wrong", f"{callers.calls}, {len(callers.wrong)}"
    assert not callers.wrong, callers.wrong[:3]
    used, begun = _cpu_seconds(follower), time.monotonic()
    every = [(pool, number) for pool, size in enumerate(scale.sizes) for number in range(size)]
    a_minute = len(every) // 10
    with Callers(scale, [gateway]) as callers:
        for endpoint in every[:: len(every) // a_minute][:a_minute]:
            scale.moved.add(endpoint)
            scale.write()
            time.sleep(max(0.0, begun + len(scale.moved) * 60 / a_minute - time.monotonic()))
    took = time.monotonic() - begun
    yield "endpoints moved in s", f"{len(scale.moved)} in {took:.0f}"
    yield "calls meanwhile, wrong", f"{callers.calls}, {len(callers.wrong)}"
    yield "follower's share of a core meanwhile", f"{(_cpu_seconds(follower) - used) / took:.3f}"
    yield "memory: Envoy, follower", f"{_memory(gateway.pid)}; {_memory(follower)}"
    assert not callers.wrong, callers.wrong[:3]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pools", type=int, default=30)
    parser.add_argument("--endpoints", type=int, default=500)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two checks of one pod")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checks", choices=("on", "off", "both"), default="both")
    for internal in ("--port", "--part"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        pools = range(arguments.part, arguments.pools, arguments.processes)
        asyncio.run(_serve(pools, _sizes(arguments.pools, arguments.endpoints), arguments.port))
    for checks in {"on": (True,), "off": (False,), "both": (True, False)}[arguments.checks]:
        print(f"health checks {'by the gateway' if checks else 'by somebody else'}", flush=True)
        for what, figure in _measure(arguments, checks=checks):
            print(f"  {what}: {figure}", flush=True)


if __name__ == "__main__":
    main()

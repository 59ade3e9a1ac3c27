"""Endpoints as Kubernetes tells them: an API server of the tests, our reader, and the real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.build import configuration
from gateway.endpoint_slices import EndpointSlices
from gateway.process import Envoy
from gateway.topology import Topology, parse
from gateway.xds import BOOTSTRAP, Publisher
from services.core.catalog import Catalog
from tests.gateway.scripted import ScriptedService
from tests.gateway.test_changes import Traffic
from tests.servers import free_port
from tests.stack import MODEL

PATH = "/apis/discovery.k8s.io/v1/namespaces/search/endpointslices"
TOKEN = "of the kubelet"


def _slice(name: str, service: str, **ready: bool) -> dict[str, Any]:
    """An EndpointSlice; addresses are written with underscores."""
    endpoints = [
        {"addresses": [address.strip("a").replace("_", ".")], "conditions": {"ready": is_ready}}
        for address, is_ready in ready.items()
    ]
    labels = {"kubernetes.io/service-name": service}
    return {"metadata": {"name": name, "labels": labels}, "addressType": "IPv4", "endpoints": endpoints}


class Api:
    """As much of an API server as a watch needs: a list, and events for as long as it is not told to end."""

    def __init__(self) -> None:
        self.slices: dict[str, dict[str, Any]] = {}
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.lists = 0
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                allowed = self.headers["Authorization"] == f"Bearer {TOKEN}" and path == PATH
                self.send_response(200 if allowed else 403)
                self.end_headers()
                if not allowed:
                    return
                if "watch=1" not in query:
                    api.lists += 1
                    document = {"metadata": {"resourceVersion": "7"}, "items": list(api.slices.values())}
                    self.wfile.write(json.dumps(document).encode())
                    return
                while (event := api.events.get()) is not None:
                    self.wfile.write(json.dumps(event).encode() + b"\n")
                    self.wfile.flush()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def put(self, one: dict[str, Any]) -> None:
        """Change a slice and tell of it."""
        self.slices[one["metadata"]["name"]] = one
        self.events.put({"type": "MODIFIED", "object": one})

    def close(self) -> None:
        self.events.put(None)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    with contextlib.closing(Api()) as running:
        yield running


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(TOKEN + "\n")
    return tmp_path


def _topology(port: int, service: str, admin: int = 1) -> Topology:
    pool = {"name": "a", "capabilities": ["embed"], "models": [MODEL], "service": service}
    return parse(
        {
            "listener": {"port": port},
            "admin": {"port": admin},
            "health_check": {"active": False},
            "pools": [pool],
            "access_log": None,
        }
    )


async def test_only_ready_endpoints_of_the_service_are_used(api: Api, account: Path) -> None:
    api.slices = {
        "one": _slice("one", "embed", a10_0_0_1=True, a10_0_0_2=False),
        "two": _slice("two", "embed", a10_0_0_3=True),
        "other": _slice("other", "rerank", a10_0_0_4=True),
    }
    slices = EndpointSlices(api.url, "search", account)
    await slices.read()
    (pool,) = slices.resolve(_topology(1, "embed:50051")).pools
    assert pool.addresses == ("10.0.0.1:50051", "10.0.0.3:50051")
    (pool,) = slices.resolve(_topology(1, "nobody:50051")).pools
    assert pool.addresses == ()


async def test_endpoints_come_and_go_under_traffic(api: Api, account: Path, tmp_path: Path) -> None:
    first = ScriptedService("first", host="127.0.0.2")
    first.start()
    second = ScriptedService("second", first.port, host="127.0.0.3")
    second.start()
    topology = _topology(free_port(), f"embed:{first.port}", free_port())
    api.put(_slice("one", "embed", a127_0_0_2=True))
    slices = EndpointSlices(api.url, "search", account)
    await slices.read()
    publisher = Publisher(tmp_path / "envoy", topology.admin)
    await publisher.publish(configuration(slices.resolve(topology), Catalog.load()))
    envoy = await Envoy.start(tmp_path / "envoy" / BOOTSTRAP, topology)

    async def follow() -> None:
        async for _ in slices.watch():
            publisher.put_endpoints(slices.resolve(topology))

    following = asyncio.create_task(follow())
    url = f"http://127.0.0.1:{topology.listener.port}"

    def answers(name: str) -> bool:
        """Whether all of some calls are answered by that service."""
        with contextlib.suppress(httpx.ConnectError), httpx.Client(timeout=100) as client:
            bodies = [client.post(f"{url}/v1/embeddings", json={"model": MODEL}).text for _ in range(8)]
            return all(f'"{name}"' in body for body in bodies)
        return False

    async def until(name: str) -> None:
        deadline = time.monotonic() + 100
        while not await asyncio.to_thread(answers, name):
            assert time.monotonic() < deadline, f"{name} does not answer"

    try:
        await until("first")
        with Traffic(url, MODEL) as traffic:
            api.put(_slice("one", "embed", a127_0_0_2=False, a127_0_0_3=True))
            await until("second")
            listed = api.lists
            # The server forgets what we have seen: everything is read anew.
            api.slices["one"] = _slice("one", "embed", a127_0_0_2=True)
            api.events.put({"type": "ERROR", "object": {"code": 410}})
            await until("first")
            assert api.lists > listed
        assert traffic.failed == []
    finally:
        following.cancel()
        await envoy.stop(5)
        first.stop()
        second.stop()

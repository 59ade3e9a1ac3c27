"""The topology changes under traffic: nothing restarts, no call fails, and only what changes is touched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from gateway.build import configuration
from gateway.topology import parse
from gateway.xds import Publisher, follow, split
from services.core.catalog import Catalog
from tests.gateway.certificates import Certificates, Pair
from tests.gateway.client import post
from tests.gateway.conftest import OTHER_MODEL, StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.servers import free_port
from tests.stack import MODEL, Stack, child_of, http_get, wait_for

_WORKERS = 4


class Traffic:
    """Callers that go on without a pause, on connections they keep; ``failed`` holds what went wrong."""

    def __init__(self, url: str, model: str, *, verify: ssl.SSLContext | bool = True) -> None:
        self.calls = 0
        self._verify = verify
        self.failed: list[str] = []
        self._url = url
        self._model = model
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(_WORKERS)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with httpx.Client(timeout=100, verify=self._verify) as client:
            while not self._end.is_set():
                try:
                    answer = client.post(f"{self._url}/v1/embeddings", json={"model": self._model})
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                else:
                    self.calls += 1
                    if answer.status_code != 200:
                        self.failed.append(answer.text)


@pytest.fixture
def services() -> Iterator[dict[str, ScriptedService]]:
    with contextlib.ExitStack() as stack:
        found = {name: ScriptedService(name) for name in ("a", "b", "c")}
        for service in found.values():
            service.start()
            stack.callback(service.stop)
        yield found


def _who_answers(stack: Stack, model: str) -> str:
    answer = post(stack.http_port, {"model": model})
    return answer.json["service"] if answer.status == 200 else answer.body.decode()


def _statistic(stack: Stack, name: str) -> int:
    _, text = http_get(stack.admin_port, f"/stats?filter=^{name}$")
    return int(text.decode().rpartition(": ")[2])


def test_pools_models_and_endpoints_change_under_traffic(
    start_gateway: StartGateway, services: dict[str, ScriptedService]
) -> None:
    first = pool(services["a"])
    stack = start_gateway(first)
    command = stack.envoy
    assert command is not None
    envoy = child_of(command)
    file = stack.folder / "topology.yaml"
    document: dict[str, Any] = yaml.safe_load(file.read_text())

    def write(*pools: dict[str, Any]) -> None:
        file.write_text(yaml.safe_dump(document | {"pools": list(pools)}))

    def until(model: str, name: str) -> None:
        wait_for(lambda: _who_answers(stack, model) == name, command)

    with Traffic(stack.url, MODEL) as traffic:
        until(OTHER_MODEL, "a")
        write(first, pool(services["b"], OTHER_MODEL))
        until(OTHER_MODEL, "b")
        assert json.loads(http_get(stack.http_port, "/ready")[1])["checks"].keys() == {"a", "b"}
        assert OTHER_MODEL in http_get(stack.http_port, "/v1/models")[1].decode()
        write(first, pool(services["c"], OTHER_MODEL) | {"name": "b"})
        until(OTHER_MODEL, "c")
        file.write_text("pools: [")
        wait_for(lambda: "the gateway stays as it is" in command.text(), command)
        assert _who_answers(stack, OTHER_MODEL) == "c"
        write(first)
        until(OTHER_MODEL, "a")
        assert OTHER_MODEL not in http_get(stack.http_port, "/v1/models")[1].decode()
        wait_for(lambda: _statistic(stack, "cluster_manager.active_clusters") == 1, command)
        done = traffic.calls
        wait_for(lambda: traffic.calls > done + _WORKERS, command)
    assert traffic.failed == []
    assert child_of(command) == envoy
    for untouched in ("listener_manager.listener_modified", "cluster_manager.cluster_modified"):
        assert _statistic(stack, untouched) == 0


def test_pools_share_a_model_by_weight_and_stand_in_for_each_other(
    start_gateway: StartGateway, services: dict[str, ScriptedService]
) -> None:
    """A canary beside the others, taken to all of the calls and back, and a pool whose endpoints are gone."""
    weights = {"a": 50, "b": 50, "c": 0}
    pools = [pool(services[name]) | {"weight": weight} for name, weight in weights.items()]
    stack = start_gateway(*pools, outsider := pool(services["c"], OTHER_MODEL) | {"name": "other"})
    command = stack.envoy
    assert command is not None
    file = stack.folder / "topology.yaml"
    document: dict[str, Any] = yaml.safe_load(file.read_text())

    def answering(calls: int = 64) -> set[str]:
        return {_who_answers(stack, MODEL) for _ in range(calls)}

    def write(**weights: int) -> None:
        shares = [pool(services[name]) | {"weight": weight} for name, weight in weights.items()]
        file.write_text(yaml.safe_dump(document | {"pools": [*shares, outsider]}))

    assert answering() == {"a", "b"}
    with Traffic(stack.url, MODEL) as traffic:
        write(a=0, b=1, c=0)
        wait_for(lambda: answering() == {"b"}, command)
        write(a=1, b=0, c=0)
        wait_for(lambda: answering() == {"a"}, command)
    assert traffic.failed == []
    services["a"].stop()
    wait_for(lambda: answering(8) <= {"b", "c"}, command)
    services["b"].stop()
    wait_for(lambda: answering(8) == {"c"}, command)
    services["a"].start()
    wait_for(lambda: answering(8) == {"a"}, command)


def _config(*pools: dict[str, Any]) -> dict[str, Any]:
    return configuration(parse({"listener": {"port": 1}, "pools": list(pools)}), Catalog.load())


def test_only_what_a_change_touches_is_written(tmp_path: Path) -> None:
    one = {"name": "a", "capabilities": ["embed"], "models": [MODEL], "addresses": ["127.0.0.1:1"]}
    two = one | {"name": "b", "models": [OTHER_MODEL]}
    three = one | {"name": "c", "models": ["jina-embeddings-v2-base-en"], "addresses": ["embed.example:1"]}
    before, after = (split(_config(*pools), tmp_path) for pools in ((one, two), (one, two, three)))
    assert before.bootstrap == after.bootstrap
    changed = {name for name in after.resources if before.resources.get(name) != after.resources[name]}
    assert changed == {("cds", "clusters"), ("rds", "rest")}
    clusters = [c for c in after.resources["cds", "clusters"] if c["name"] != "c"]
    assert clusters == before.resources["cds", "clusters"]


async def test_what_nothing_refers_to_any_more_is_taken_away(tmp_path: Path) -> None:
    one = {"name": "a", "capabilities": ["embed"], "models": [MODEL], "addresses": ["127.0.0.1:1"]}
    two = one | {"name": "b", "models": [OTHER_MODEL]}
    publisher = Publisher(tmp_path, None)
    assert await publisher.publish(_config(one, two))
    assert not await publisher.publish(_config(one, two))
    assert await publisher.publish(_config(one))
    assert sorted(path.name for path in (tmp_path / "eds").iterdir()) == ["a.json"]
    clusters = json.loads((tmp_path / "cds" / "clusters.json").read_text())["resources"]
    assert [cluster["name"] for cluster in clusters] == ["a"]


async def test_a_file_that_is_being_written_counts_once_it_is_whole(tmp_path: Path) -> None:
    """Written in place it is at first empty, and that is a topology too: of no pools, on other ports."""
    file = tmp_path / "topology.yaml"
    file.write_text("")
    read: list[str] = []
    taken = asyncio.Event()

    def build() -> dict[str, Any]:
        read.append(file.read_text())
        taken.set()
        return _config()

    following = asyncio.create_task(follow([file], build, Publisher(tmp_path / "files", None)))
    for size in range(200):
        file.write_text("pools: []" + " " * size)
        await asyncio.sleep(0.005)
    file.write_text("pools: []")
    await taken.wait()
    following.cancel()
    assert read == ["pools: []"]


def test_certificates_are_taken_up_under_traffic(start_gateway: StartGateway, tmp_path: Path) -> None:
    """What the gateway shows to callers and services is renewed, by another authority; no call fails."""
    old, new = Certificates(tmp_path, "old"), Certificates(tmp_path, "new")
    both = old.ca.read_bytes() + new.ca.read_bytes()
    folder = tmp_path / "secret"
    _mount(folder, old.make("first"), both)
    service = _guarded(old.make("service"), both)
    tls = {"certificate": str(folder / "tls.crt"), "private_key": str(folder / "tls.key")}
    port = free_port()
    stack = start_gateway(
        pool(service),
        http_port=port,
        listener={"port": port, "tls": tls},
        services_tls=tls | {"ca": str(folder / "ca.crt")},
    )
    command = stack.envoy
    assert command is not None
    envoy = child_of(command)
    context = ssl.create_default_context(cadata=both.decode())
    renewed = new.make("second")
    with Traffic(f"https://127.0.0.1:{port}", MODEL, verify=context) as traffic:
        wait_for(lambda: traffic.calls > _WORKERS, command)
        _mount(folder, renewed, both)
        shown = ssl.PEM_cert_to_DER_cert(renewed.certificate.read_text())
        wait_for(lambda: _shown(port, context) == shown, command)
        done = traffic.calls
        wait_for(lambda: traffic.calls > done + _WORKERS, command)
    assert traffic.failed == []
    service.stop()
    # Only who shows the new certificate may call this one, and only the new authority vouches for it.
    strict = _guarded(new.make("strict"), new.ca.read_bytes(), service.port)
    with httpx.Client(verify=context, timeout=100) as client:
        url = f"https://127.0.0.1:{port}/v1/embeddings"
        wait_for(lambda: client.post(url, json={"model": MODEL}).status_code == 200, command)
    strict.stop()
    assert child_of(command) == envoy


def _mount(folder: Path, pair: Pair, authority: bytes) -> None:
    """Put a Secret into a folder as the kubelet does: links through one link, which is swapped."""
    version = folder / f"..{pair.certificate.stem}"
    version.mkdir(parents=True)
    (version / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (version / "tls.key").write_bytes(pair.key.read_bytes())
    (version / "ca.crt").write_bytes(authority)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


def _guarded(pair: Pair, callers: bytes, port: int = 0) -> ScriptedService:
    """A running service that asks callers for a certificate of these authorities."""
    chain = [(pair.key.read_bytes(), pair.certificate.read_bytes())]
    service = ScriptedService("guarded", port, grpc.ssl_server_credentials(chain, callers, True))
    service.start()
    return service


def _shown(port: int, context: ssl.SSLContext) -> bytes | None:
    """The certificate that a new connection sees."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return secure.getpeercert(binary_form=True)

"""What is slow is not dead: services that stand still, callers that crawl."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.e2e.load import Load
from tests.gateway.client import Answer, call, post
from tests.stack import MODEL, Services, Stack, child_of, http_get, wait_for

HELLO = {"model": MODEL, "input": "hello world"}
IMPATIENT = {"interval": 0.2, "unhealthy_interval": 0.2, "timeout": 0.2, "unhealthy_after": 2}
"""Health checks that would take an endpoint out within a second."""


AGAIN = "starting again"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One service and the gateway, for tests that leave them as they were."""
    with Stack(tmp_path_factory.mktemp("slow"), {"SF_AUTH": "false"}) as running:
        running.serve()
        running.gateway()
        yield running


class Later:
    """A call in another thread."""

    def __init__(self, port: int) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(post(port, HELLO)))
        self._thread.start()

    def answer(self) -> Answer:
        self._thread.join(120)
        return self._answers[0]


@contextmanager
def standing_still(*services: Services) -> Iterator[None]:
    """Stop processes, and let them go on after the block."""
    with ExitStack() as going_on:
        for each in services:
            each.command.signal(signal.SIGSTOP)
            going_on.callback(each.command.signal, signal.SIGCONT)
        yield


def unhealthy(stack: Stack) -> int:
    """How many endpoints Envoy's health checks have taken out."""
    statuses = json.loads(http_get(stack.admin_port, "/clusters?format=json")[1])["cluster_statuses"]
    hosts = [host for cluster in statuses for host in cluster.get("host_statuses", [])]
    return sum("failed_active_health_check" in host["health_status"] for host in hosts)


@pytest.mark.parametrize(
    ("seconds", "checks"),
    [
        pytest.param(2, IMPATIENT, id="short"),
        pytest.param(30, {}, id="long", marks=pytest.mark.soak),
    ],
)
def test_the_only_endpoint_is_waited_for(stack: Stack, seconds: float, checks: dict[str, float]) -> None:
    services = stack.serve()
    stack.gateway({"health_check": checks} if checks else {})
    assert post(stack.http_port, HELLO).status == 200
    with standing_still(services):
        calls = [Later(stack.http_port) for _ in range(3)]
        time.sleep(seconds)  # several times what the checks of one among several wait
        calls.append(Later(stack.http_port))
        assert unhealthy(stack) == 0
    assert [each.answer().status for each in calls] == [200] * 4
    assert post(stack.http_port, HELLO).status == 200


def test_when_all_of_several_stand_still_all_are_waited_for(stack: Stack) -> None:
    services = [stack.serve(), stack.serve()]
    both = stack.pool(services[0], "both") | {"addresses": [each.address for each in services]}
    stack.gateway({"pools": [both], "health_check": IMPATIENT})
    with standing_still(*services):
        wait_for(lambda: unhealthy(stack) == 2)
        calls = [Later(stack.http_port) for _ in range(3)]
        time.sleep(0.5)
    assert [each.answer().status for each in calls] == [200] * 3


def test_one_of_several_that_stands_still_is_left_out(stack: Stack) -> None:
    services = [stack.serve(), stack.serve()]
    both = stack.pool(services[0], "both") | {"addresses": [each.address for each in services]}
    stack.gateway({"pools": [both], "health_check": IMPATIENT})
    with standing_still(services[0]):
        wait_for(lambda: unhealthy(stack) == 1)
        assert [post(stack.http_port, HELLO).status for _ in range(6)] == [200] * 6
    wait_for(lambda: unhealthy(stack) == 0)


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(5, marks=[pytest.mark.soak, pytest.mark.timeout(900)])], ids=["short", "long"]
)
def test_a_gateway_whose_envoy_is_killed_under_load(stack: Stack, rounds: int) -> None:
    stack.serve()
    gateway = stack.gateway()
    with Load(stack.http_port, 4) as load:
        for _ in range(rounds):
            load.wait_for(200, 20)
            before = gateway.text().count(AGAIN)
            os.kill(child_of(gateway), signal.SIGKILL)
            wait_for(lambda: gateway.text().count(AGAIN) > before, gateway)  # noqa: B023 - within the round
            load.wait_for(200, 20)
    assert {outcome for outcome in load.outcomes if isinstance(outcome, int)} == {200}


@pytest.mark.parametrize(
    ("seconds", "crawlers"),
    [
        pytest.param(2, 4, id="short"),
        pytest.param(120, 64, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
def test_callers_that_crawl_harm_nobody(shared: Stack, seconds: float, crawlers: int) -> None:
    body = json.dumps({"model": MODEL, "input": ["x"] * 100}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    ends = time.monotonic() + seconds
    with ExitStack() as held:
        writers, readers = (
            [held.enter_context(_connected(shared.http_port)) for _ in range(crawlers)] for _ in "wr"
        )
        for reader in readers:
            reader.sendall(head + body)
        for writer in writers:
            writer.sendall(head)
        with Load(shared.http_port, 2) as load:
            step = 0
            while time.monotonic() < ends:
                for writer in writers:
                    writer.sendall(body[step : step + 1])
                for reader in readers:
                    reader.recv(10)
                step += 1
            load.wait_for(200, 20)
        assert set(load.outcomes) == {200}
        for writer in writers:
            writer.sendall(body[step:])
            assert writer.recv(15) == b"HTTP/1.1 200 OK"


def _connected(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.mark.parametrize(
    "streams", [300, pytest.param(20_000, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_rapid_resets_harm_nobody(shared: Stack, streams: int) -> None:
    """Streams that are opened and reset at once, as many as the connection is left to take."""
    with Load(shared.http_port, 2) as load:
        load.wait_for(200, 5)
        _open_and_reset(shared.http_port, streams)
        load.wait_for(200, 20)
    assert set(load.outcomes) == {200}
    assert call(shared.http_port, "GET", "/ready").status == 200


def _open_and_reset(port: int, streams: int) -> None:
    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload

    fields = {b":method": b"POST", b":scheme": b"http", b":path": b"/v1/embeddings", b":authority": b"x"}
    head = b"".join(b"\x00" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in fields.items())
    left = streams
    while left:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            try:
                for number in range(left):
                    stream = 2 * number + 1
                    connection.sendall(frame(1, 4, stream, head) + frame(3, 0, stream, (8).to_bytes(4)))
                    left -= 1
            except ConnectionError:
                continue  # the gateway has had enough of this connection

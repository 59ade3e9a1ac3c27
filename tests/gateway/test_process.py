"""The ``gateway`` command: starting, draining, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from search_foundation.cli import main
from tests.gateway.client import Answer, get, post
from tests.gateway.conftest import StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.servers import free_port
from tests.stack import child_of, wait_for


class Background:
    """A call in another thread."""

    def __init__(self, port: int, service: ScriptedService, seconds: float) -> None:
        self.answer: Answer | None = None
        seen = len(service.calls)
        self._thread = threading.Thread(target=self._run, args=(port, seconds))
        self._thread.start()
        wait_for(lambda: len(service.calls) > seen)

    def _run(self, port: int, seconds: float) -> None:
        self.answer = post(port, {"do": "sleep", "seconds": seconds})

    def result(self) -> Answer:
        self._thread.join(20)
        assert self.answer is not None
        return self.answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_the_calls_in_flight(
    start_gateway: StartGateway, service: ScriptedService, number: signal.Signals
) -> None:
    stack = start_gateway(pool(service), timeouts={"drain": 0})
    call = Background(stack.http_port, service, seconds=1.5)
    assert stack.envoy is not None
    stack.envoy.signal(number)
    answer = call.result()
    assert answer.status == 200
    assert answer.headers["connection"] == "close"
    assert stack.envoy.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        get(stack.http_port, "/health")


def test_while_it_drains_new_calls_are_still_taken(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    stack = start_gateway(pool(service), timeouts={"drain": 2})
    assert stack.envoy is not None
    stack.envoy.signal(signal.SIGTERM)
    wait_for(lambda: "connection" in get(stack.http_port, "/health").headers)
    assert post(stack.http_port, {}).status == 200
    assert stack.envoy.wait() == 0


def test_calls_that_take_longer_than_the_grace_are_cut(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    stack = start_gateway(pool(service), timeouts={"drain": 0}, settings={"SF_GRACE_SECONDS": "1"})
    call = threading.Thread(target=_ignore_errors, args=(stack.http_port,))
    call.start()
    wait_for(lambda: len(service.calls) == 1)
    assert stack.envoy is not None
    stack.envoy.signal(signal.SIGTERM)
    assert stack.envoy.wait(10) == 0
    call.join()


def _ignore_errors(port: int) -> None:
    try:
        post(port, {"do": "sleep", "seconds": 8})
    except (ConnectionError, OSError):
        return


def test_drain_from_beside(start_gateway: StartGateway, service: ScriptedService) -> None:
    stack = start_gateway(pool(service))
    call = Background(stack.http_port, service, seconds=1.5)
    environment = stack.environment | {"SF_ADMIN_PORT": str(stack.admin_port), "SF_DRAIN_SECONDS": "0"}
    drained = subprocess.run(
        [sys.executable, "-m", "search_foundation.cli", "gateway", "--drain"],
        env=environment,
        timeout=120,
        check=False,
    )
    assert drained.returncode == 0
    assert call.result().status == 200
    with pytest.raises(ConnectionRefusedError):
        get(stack.http_port, "/health")


def test_drain_of_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SF_ADMIN_PORT", str(free_port()))
    assert main(["gateway", "--drain"]) == 1
    assert "does not answer" in capfd.readouterr().err


def test_the_end_of_envoy_ends_the_command(start_gateway: StartGateway, service: ScriptedService) -> None:
    taken = start_gateway(pool(service))
    other = start_gateway(pool(service), http_port=taken.http_port, ready=False)
    assert other.envoy is not None
    assert other.envoy.wait() == 1
    assert "Address already in use" in other.envoy.text()
    assert f"Envoy cannot listen on 127.0.0.1:{taken.http_port}" in other.envoy.text()


def test_envoy_is_started_again(start_gateway: StartGateway, service: ScriptedService) -> None:
    stack = start_gateway(pool(service))
    assert stack.envoy is not None
    wait_for(lambda: "the gateway takes calls" in stack.envoy.text(), stack.envoy)
    os.kill(child_of(stack.envoy), signal.SIGKILL)
    wait_for(lambda: "starting again in 0.5 s" in stack.envoy.text(), stack.envoy)
    stack.wait_until_ready()
    assert post(stack.http_port, {}).status == 200
    stack.envoy.signal(signal.SIGTERM)
    assert stack.envoy.wait() == 0


def test_print_and_render(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("SF_CONFIG", raising=False)
    assert main(["gateway", "--print"]) == 0
    printed = capfd.readouterr().out
    assert yaml.safe_load(printed)["static_resources"]["clusters"][0]["name"] == "local"
    assert main(["gateway", "--render", str(tmp_path / "envoy.yaml")]) == 0
    assert (tmp_path / "envoy.yaml").read_text() == printed


def test_a_wrong_topology_is_one_sentence(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    topology = tmp_path / "topology.yaml"
    topology.write_text("pools: []")
    assert main(["gateway", "--topology", str(topology), "--print"]) == 2
    assert capfd.readouterr().err.startswith("Wrong gateway settings of ")
    topology.write_text("pools: [{name: a, capabilities: [embed], models: [nope], addresses: ['h:1']}]")
    assert main(["gateway", "--topology", str(topology), "--print"]) == 2
    assert capfd.readouterr().err.startswith("Unknown model 'nope'")

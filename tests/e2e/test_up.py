"""The command a new user types."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.load import LOST, REFUSED, Load
from tests.gateway.client import get, post
from tests.servers import free_port
from tests.stack import MODEL, Command, wait_for

HELLO = {"model": MODEL, "input": "hello world"}
PORTS = ("SF_HTTP_PORT", "SF_GRPC_PORT", "SF_METRICS_PORT", "SF_ADMIN_PORT")


class Up:
    """One run of ``up`` on free ports."""

    def __init__(self, folder: Path, *words: str, **settings: str) -> None:
        self.ports = {name: free_port() for name in PORTS}
        environment = {
            "SF_DATA_DIR": str(folder / "data"),
            **{name: str(port) for name, port in self.ports.items()},
            **settings,
        }
        self.command = Command.start(f"up-{time.monotonic_ns()}", ("up", *words), environment, folder)

    @property
    def port(self) -> int:
        return self.ports["SF_HTTP_PORT"]

    def welcome(self) -> str:
        wait_for(lambda: "\ncurl " in self.command.text(), self.command)
        return self.command.text()

    def key(self) -> dict[str, str]:
        found = re.search(r"jina_[A-Za-z0-9_-]{60}", self.welcome())
        assert found, self.welcome()
        return {"authorization": f"Bearer {found[0]}"}

    def children(self) -> dict[str, int]:
        """Process ids by what they are."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.command.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        children: dict[str, int] = {}
        for line in listed.splitlines():
            pid, arguments = line.split(None, 1)
            children["services" if "serve" in arguments else "envoy"] = int(pid)
        return children


def listening_on(port: int) -> list[str]:
    """The addresses that something listens on at a port."""
    rows = [
        line.split()
        for file in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{file}").read_text().splitlines()
    ]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [_address(host) for host, number in listening if int(number, 16) == port]


def _address(text: str) -> str:
    words = bytes.fromhex(text)
    packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Up]]:
    running: list[Up] = []
    yield running
    for up in running:
        up.command.stop()


def test_from_nothing_to_an_answer(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path)
    started.append(up)
    welcome = up.welcome()
    line = next(line for line in welcome.splitlines() if line.startswith("curl "))
    answered = subprocess.run(shlex.split(line), capture_output=True, timeout=100, check=True)
    assert b'"embedding":[' in answered.stdout
    assert f"http://127.0.0.1:{up.port}/v1" in welcome
    assert get(up.port, "/ready").status == 200
    assert post(up.port, HELLO).error() == (401, "AUTH_MISSING_API_KEY")
    assert up.key()["authorization"].partition(" ")[2] not in (tmp_path / "data").rglob("*")

    up.command.signal(signal.SIGINT)
    assert up.command.wait() == 0
    again = Up(tmp_path)
    started.append(again)
    assert not re.search(r"jina_[A-Za-z0-9_-]{60}", again.welcome())
    assert post(again.port, HELLO, up.key()).status == 200


def test_it_listens_on_loopback_only(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path, SF_AUTH="false")
    started.append(up)
    up.welcome()
    assert post(up.port, HELLO).status == 200
    for name, port in up.ports.items():
        assert listening_on(port) == ["127.0.0.1"], name


def test_services_stay_on_loopback_when_the_gateway_does_not(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path, "--host", "0.0.0.0", SF_AUTH="false")
    started.append(up)
    up.welcome()
    hosts = {name: listening_on(port) for name, port in up.ports.items()}
    assert hosts.pop("SF_HTTP_PORT") == ["0.0.0.0"]
    assert set(map(tuple, hosts.values())) == {("127.0.0.1",)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_nothing(tmp_path: Path, started: list[Up], number: signal.Signals) -> None:
    up = Up(tmp_path)
    started.append(up)
    with Load(up.port, 8, up.key()) as load:
        load.wait_for(200, 50)
        up.command.signal(number)
        assert up.command.wait() == 0
    assert set(load.outcomes) <= {200, REFUSED}
    assert not load.outcomes[LOST]


@pytest.mark.parametrize(("victim", "name"), [("services", "services"), ("envoy", "Envoy")])
def test_what_ends_is_started_again(tmp_path: Path, started: list[Up], victim: str, name: str) -> None:
    up = Up(tmp_path)
    started.append(up)
    headers = up.key()
    first = up.children()
    os.kill(first[victim], signal.SIGKILL)
    wait_for(lambda: first[victim] not in up.children().values() and len(up.children()) == 2, up.command)
    wait_for(lambda: status_of(up.port, headers) == 200, up.command)
    assert f"{name} ended with status -9, starting again in 0.5 s" in up.command.text()
    up.command.signal(signal.SIGTERM)
    assert up.command.wait() == 0
    assert not any(map(alive, up.children().values()))


def status_of(port: int, headers: dict[str, str]) -> int:
    """The status of a call; 0 when nothing listens."""
    try:
        return post(port, HELLO, headers).status
    except (OSError, http.client.HTTPException):
        return 0


def test_a_start_that_fails_makes_no_key(tmp_path: Path, started: list[Up]) -> None:
    failed = Up(tmp_path, SF_MODELS='["jina-embeddings-v3"]')
    assert failed.command.wait() == 1
    assert "services ended with status" in failed.command.text()
    again = Up(tmp_path)
    started.append(again)
    assert post(again.port, HELLO, again.key()).status == 200


def test_the_data_folder_is_for_its_owner(tmp_path: Path, started: list[Up]) -> None:
    data = tmp_path / "new" / "data"
    up = Up(tmp_path, SF_DATA_DIR=str(data))
    started.append(up)
    up.welcome()
    folders = [data.parent, data, *(path for path in data.rglob("*") if path.is_dir())]
    assert {path: path.stat().st_mode & 0o777 for path in folders} == dict.fromkeys(folders, 0o700)


def test_nothing_is_left_behind_when_it_is_killed(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path, SF_AUTH="false")
    up.welcome()
    children = up.children()
    assert set(children) == {"services", "envoy"}
    up.command.kill()
    wait_for(lambda: not any(map(alive, children.values())))


def test_a_stop_while_it_starts(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path)
    started.append(up)
    wait_for(lambda: len(up.children()) == 2, up.command)
    up.command.signal(signal.SIGTERM)
    assert up.command.wait() == 0
    assert "is ready" not in up.command.text()


@pytest.mark.parametrize("variable", PORTS)
def test_a_port_that_is_taken(tmp_path: Path, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = Up(tmp_path, **{variable: str(port)})
        assert up.command.wait() == 2
        text = up.command.text()
    assert text.count("\n") == 1
    assert f"port {port}" in text
    assert variable in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"SF_MODELS": '["nope"]'}, "Unknown model 'nope'"),
        ({"SF_MODELZ": "x"}, "Unknown setting SF_MODELZ. Did you mean SF_MODELS?"),
        ({"SF_GATEWAY_FILE": "/nowhere.yaml"}, "Cannot read the gateway file /nowhere.yaml"),
        ({"SF_HTTP_PORT": "eighty"}, "SF_HTTP_PORT"),
    ],
    ids=str,
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, str], sentence: str) -> None:
    up = Up(tmp_path, **settings)
    assert up.command.wait() == 2
    assert sentence in up.command.text()
    assert "Traceback" not in up.command.text()

"""The command a new user types."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.e2e.load import LOST, REFUSED, Load
from tests.gateway.client import get, post
from tests.servers import free_port
from tests.stack import MODEL, Command, wait_for
from tests.terminal import Terminal

HELLO = {"model": MODEL, "input": "hello world"}
PORTS = ("SF_HTTP_PORT", "SF_GRPC_PORT", "SF_METRICS_PORT", "SF_ADMIN_PORT")


KEY = re.compile(r"jina_[A-Za-z0-9_-]{60}")


class Up:
    """One run of ``up`` on free ports."""

    def __init__(self, folder: Path, *words: str, **settings: str) -> None:
        self.data = Path(settings.get("SF_DATA_DIR", folder / "data"))
        self.ports = {name: free_port() for name in PORTS}
        environment = {
            "SF_DATA_DIR": str(self.data),
            **{name: str(port) for name, port in self.ports.items()},
            **settings,
        }
        environment = {name: value for name, value in environment.items() if value}
        self.command = Command.start(f"up-{time.monotonic_ns()}", ("up", *words), environment, folder)

    @property
    def port(self) -> int:
        return self.ports["SF_HTTP_PORT"]

    def welcome(self) -> str:
        wait_for(lambda: "\n  Key   " in self.command.text(), self.command)
        return self.command.text()

    def key(self) -> dict[str, str]:
        self.welcome()
        return {"authorization": f"Bearer {(self.data / 'first-key').read_text().strip()}"}

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


def call_as_printed(welcome: str) -> bytes:
    """What the line that is printed answers when it is pasted into a shell."""
    line = next(line for line in welcome.splitlines() if line.startswith("curl "))
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=100, check=True).stdout


def test_from_nothing_to_an_answer(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path)
    started.append(up)
    welcome = up.welcome()
    assert b'"embedding":[' in call_as_printed(welcome)
    assert f"http://127.0.0.1:{up.port}/v1" in welcome
    assert get(up.port, "/ready").status == 200
    assert post(up.port, HELLO).error() == (401, "AUTH_MISSING_API_KEY")

    file = up.data / "first-key"
    key = file.read_text().strip()
    assert [line for line in welcome.splitlines() if line][-1] == f"  Key   {key}"
    assert welcome.count(key) == 1
    assert str(file) in welcome
    assert file.stat().st_mode & 0o777 == 0o600
    others = [path for path in up.data.rglob("*") if path.is_file() and path != file]
    assert not any(key.encode() in path.read_bytes() for path in others)

    up.command.signal(signal.SIGINT)
    assert up.command.wait() == 0
    _, _, after = up.command.text().partition("stopping, once the calls in flight are answered\n")
    assert all('"request_id"' in line for line in after.splitlines()), after  # calls, which Envoy writes late
    again = Up(tmp_path)
    started.append(again)
    assert not KEY.search(again.welcome())
    assert str(file) in again.welcome()
    assert b'"embedding":[' in call_as_printed(again.welcome())


def test_a_key_of_another_installation_is_not_shown(tmp_path: Path, started: list[Up]) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "search_foundation.cli", "keys", "create"],
        env={**os.environ, "SF_DATA_DIR": str(tmp_path / "data"), "GRPC_ENABLE_FORK_SUPPORT": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "data" / "first-key").write_text("jina_of_another\n")
    up = Up(tmp_path)
    started.append(up)
    assert "one of those made before" in up.welcome()
    assert '"Authorization: Bearer $API_KEY"' in up.welcome()
    assert post(up.port, HELLO, {"authorization": f"Bearer {made.stdout.strip()}"}).status == 200


def test_the_line_that_is_printed_asks_for_what_is_served(tmp_path: Path, started: list[Up]) -> None:
    up = Up(tmp_path, "rerank", SF_AUTH="false")
    started.append(up)
    assert b'"relevance_score":' in call_as_printed(up.welcome())


def test_a_second_copy_needs_one_variable(tmp_path: Path, started: list[Up]) -> None:
    """Ports that nobody has named are the next free ones; one that was named is taken or refused."""
    with ExitStack() as stack:
        for port in (50051, 9090, 9901):
            with suppress(OSError):  # taken by whatever else runs here, which is as good
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        up = Up(tmp_path, SF_GRPC_PORT="", SF_METRICS_PORT="", SF_ADMIN_PORT="")
        started.append(up)
        assert post(up.port, HELLO, up.key()).status == 200
    text = up.command.text()
    for port, variable in ((50051, "SF_GRPC_PORT"), (9090, "SF_METRICS_PORT"), (9901, "SF_ADMIN_PORT")):
        assert re.search(rf"port {port} is taken, \d+ is used instead \({variable}\)", text)


def test_on_a_terminal_a_call_is_one_short_line(tmp_path: Path) -> None:
    ports = {name: str(free_port()) for name in PORTS}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SF_")},
        "SF_DATA_DIR": str(tmp_path / "data"),
        **ports,
    }
    with Terminal([sys.executable, "-m", "search_foundation.cli", "up"], environment) as shown:
        wait_for(lambda: KEY.search(shown.text()))
        found = KEY.search(shown.text())
        assert found
        headers = {"authorization": f"Bearer {found[0]}"}
        port = int(ports["SF_HTTP_PORT"])
        assert post(port, HELLO, headers).status == 200
        assert post(port, HELLO | {"model": "nope"}, headers).status == 400
        assert get(port, "/nothing").status == 404
        wait_for(lambda: "/nothing" in shown.text())
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(100) == 0
    before, _, after = shown.text().partition(found[0])
    assert "{" not in before.replace('{"model"', "")
    clock = r"\d\d:\d\d:\d\d  "
    lines = [line.strip() for line in after.splitlines() if line.strip()]
    expected = {
        clock + rf"CreateEmbeddings  {MODEL}  OK  4 tokens  \d+ ms",
        clock + r"CreateEmbeddings  INPUT_MODEL_NOT_FOUND  \d+ ms",
        clock + r"GET /nothing  404  \d+ ms",
        "search-foundation: stopping, once the calls in flight are answered",
    }
    assert len(lines) == len(expected), lines
    assert all(any(re.fullmatch(each, line) for line in lines) for each in expected), lines


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


def test_weights_are_looked_for_before_anything_starts(tmp_path: Path) -> None:
    failed = Up(tmp_path, SF_MODELS="jina-embeddings-v3,all-MiniLM-L6-v2, jina-colbert-v2")
    assert failed.command.wait() == 1
    first, second = failed.command.text().splitlines()
    assert first.startswith("There are no weights of jina-embeddings-v3 here. Fetch them with ")
    assert second.startswith("There are no weights of jina-colbert-v2 here. ")
    assert not failed.data.exists()


def test_a_start_that_fails_makes_no_key(tmp_path: Path, started: list[Up]) -> None:
    folder = tmp_path / "models" / "jina-embeddings-v3"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    failed = Up(tmp_path, SF_MODELS="jina-embeddings-v3", SF_MODEL_DIR=str(tmp_path / "models"))
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
        ({"SF_MODELS": "nope"}, "Unknown model 'nope'"),
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

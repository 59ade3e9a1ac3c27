"""``search-foundation batch`` against the running system, input and news over HTTP included."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.stack import MODEL, Stack

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = {"SF_FETCH_ALLOW_NETWORKS": '["127.0.0.1/32"]', "SF_WEBHOOK_SECRET": SECRET}
    with Stack(tmp_path_factory.mktemp("batch"), settings) as running:
        running.serve("batch")
        running.gateway()
        yield running


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return stack.create_key()


class Command:
    """Runs the command in a folder of its own, with a key in the variable."""

    def __init__(self, stack: Stack, key: str, folder: Path) -> None:
        self.folder = folder
        self._url = stack.url
        self._environment = {**os.environ, "API_KEY": key}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "search_foundation.cli",
                "batch",
                words[0],
                "--url",
                self._url,
                *words[1:],
            ],
            env=self._environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        with self.start(*words) as process:
            output, errors = process.communicate(timeout=180)
        return process.returncode, output, errors


@pytest.fixture
def command(stack: Stack, key: str, tmp_path: Path) -> Command:
    return Command(stack, key, tmp_path)


def content(count: int) -> bytes:
    lines = [{"custom_id": f"c{n}", "body": {"input": f"text {n} of several"}} for n in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def outputs(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def site(files: dict[str, bytes]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A web server with ``files``, that keeps what is posted to it."""
    posted: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", posted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_from_a_file_to_the_output(command: Command) -> None:
    bad = b'{"custom_id": "bad", "body": {"input": 3}}\n'
    (command.folder / "in.jsonl").write_bytes(content(20) + bad)
    code, output, errors = command.run("submit", "in.jsonl", "--model", MODEL, "-o", "out.jsonl")
    assert code == 0, errors
    batch_id = output.strip()
    assert "20 of 21 lines embedded, 1 failed." in errors
    found = outputs(command.folder / "out.jsonl")
    assert [line["custom_id"] for line in found] == [f"c{n}" for n in range(20)]

    code, output, _ = command.run("download", batch_id, "--errors", "-o", "-")
    assert code == 0
    assert [json.loads(line)["custom_id"] for line in output.splitlines()] == ["bad"]

    code, output, _ = command.run("status", batch_id, "--json")
    assert (code, json.loads(output)["status"]) == (0, "completed")
    code, output, _ = command.run("list")
    assert code == 0
    assert batch_id in output
    code, _, errors = command.run("cancel", batch_id)
    assert code == 1
    assert "CONFLICT" in errors


def test_a_download_goes_on_from_what_is_there(command: Command) -> None:
    (command.folder / "in.jsonl").write_bytes(content(40))
    _, output, _ = command.run("submit", "in.jsonl", "--model", MODEL, "-o", "out.jsonl")
    whole = (command.folder / "out.jsonl").read_bytes()
    part = command.folder / f"again.jsonl.{output.strip()}.output.part"
    part.write_bytes(whole[: len(whole) // 2])
    code, _, errors = command.run("download", output.strip(), "-o", "again.jsonl")
    assert code == 0, errors
    assert (command.folder / "again.jsonl").read_bytes() == whole
    assert not part.exists()


def test_ctrl_c_then_watch_again(command: Command) -> None:
    (command.folder / "in.jsonl").write_bytes(content(10_000))
    with command.start("submit", "in.jsonl", "--model", MODEL, "--watch") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        batch_id = process.stdout.readline().strip()
        assert batch_id in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert f"batch watch {batch_id}" in rest
    watching = command.start("watch", batch_id)
    assert command.run("cancel", batch_id)[0] == 0
    _, errors = watching.communicate(timeout=180)
    assert watching.returncode == 1
    assert "The job is cancelled" in errors


def test_input_by_url_and_signed_news(command: Command) -> None:
    with site({"/in.jsonl.gz": gzip.compress(content(5))}) as (url, posted):
        words = ["--model", MODEL, "--webhook", f"{url}/news", "-o", "out.jsonl"]
        code, output, errors = command.run("submit", f"{url}/in.jsonl.gz", *words)
        assert code == 0, errors
        assert len(outputs(command.folder / "out.jsonl")) == 5
        deadline = threading.Event()
        for _ in range(300):
            if posted:
                break
            deadline.wait(0.1)
    ((headers, body),) = posted
    news = json.loads(body)
    assert (news["batch_id"], news["status"]) == (output.strip(), "completed")
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()


@pytest.mark.parametrize("url", ["http://127.0.0.2:9/in.jsonl", "http://169.254.169.254/latest/meta-data"])
def test_input_from_inside_is_refused(command: Command, url: str) -> None:
    code, _, errors = command.run("submit", url, "--model", MODEL, "--watch")
    assert code == 1
    assert "not public" in errors


def test_errors_of_the_server_are_told(command: Command) -> None:
    for words in (["status", "batch_00"], ["watch", "batch_00"], ["download", "batch_00"]):
        code, _, errors = command.run(*words)
        assert code == 1
        assert errors.startswith("RESOURCE_NOT_FOUND: ")
    (command.folder / "in.jsonl").write_bytes(content(1))
    code, _, errors = command.run("submit", "in.jsonl", "--model", "no-such-model")
    assert code == 1
    assert "INPUT_MODEL_NOT_FOUND" in errors

"""``search-foundation serve`` as an operator runs it: a process with the real engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 180.0
REQUEST = HttpBody(data=b'{"model": "all-MiniLM-L6-v2", "input": "hello world"}').SerializeToString()


@dataclass
class Served:
    """A running ``serve`` command."""

    process: subprocess.Popen[str]
    ports_file: Path
    log: Path

    def ports(self) -> dict[str, int]:
        deadline = time.monotonic() + START_SECONDS
        while not self.ports_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not ready, status {self.process.poll()}: {self.log.read_text()}")
            time.sleep(0.05)
        return json.loads(self.ports_file.read_text())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports()['grpc_port']}"

    def page(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.ports()['metrics_port']}/{path}"
        with urllib.request.urlopen(url, timeout=100) as answer:
            return answer.read().decode()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(START_SECONDS)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str, **settings: object) -> Served:
        ports_file = tmp_path / f"ports-{len(begun)}.json"
        values = {
            "auth": "false",
            "grpc_port": 0,
            "metrics_port": 0,
            "drain_seconds": 0,
            "data_dir": tmp_path / "data",
            "ports_file": ports_file,
        } | settings
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SF_")}
        environment |= {f"SF_{name.upper()}": str(value) for name, value in values.items()}
        log = tmp_path / f"log-{len(begun)}.jsonl"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "search_foundation.cli", "serve", *words],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        begun.append(process)
        return Served(process, ports_file, log)

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def create(address: str, count: int = 1) -> list[bytes]:
    """Embed a text over as many connections, since each may lead to another worker."""
    answers = []
    for number in range(count):
        options = [("grpc.primary_user_agent", f"connection-{number}")]
        with grpc.insecure_channel(address, options=options) as channel:
            method = channel.unary_unary("/searchfoundation.v1.EmbedRestService/CreateEmbeddings")
            answers.append(HttpBody.FromString(method(REQUEST, timeout=30)).data)
    return answers


def test_a_process_serves_tells_its_ports_and_ends_at_sigterm(serve: Any) -> None:
    served = serve("embed")
    ports = served.ports()
    assert ports["pid"] == served.process.pid
    assert create(served.address)[0].startswith(b'{"model":"all-MiniLM-L6-v2","object":"list"')
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "searchfoundation.v1.EmbedService", "searchfoundation.v1.EmbedRestService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert 'searchfoundation_requests_total{capability="embed",code="OK"' in served.page("metrics")
    assert served.page("ready") == '{"status":"ok"}'
    assert served.process.stdout.readline() == (
        f"search-foundation: serving embed with all-MiniLM-L6-v2 on {served.address}, "
        f"metrics on 127.0.0.1:{ports['metrics_port']}\n"
    )
    assert served.end() == 0
    assert not served.ports_file.exists()
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    assert [line["code"] for line in lines if line["logger"] == "access"] == ["OK"]


def test_an_interrupt_is_an_orderly_end_too(serve: Any) -> None:
    served = serve("embed", drain_seconds=20)
    served.ports()
    assert served.end(signal.SIGINT) == 0


async def test_no_accepted_call_fails_at_sigterm_under_load(serve: Any) -> None:
    served = serve("embed", drain_seconds=0.5)
    address = await asyncio.to_thread(lambda: served.address)
    answered, warm = 0, asyncio.Event()
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary("/searchfoundation.v1.EmbedRestService/CreateEmbeddings")

        async def caller() -> grpc.aio.AioRpcError:
            nonlocal answered
            while True:
                try:
                    await method(REQUEST)
                    answered += 1
                    if answered == 100:
                        warm.set()
                except grpc.aio.AioRpcError as error:
                    return error

        callers = [asyncio.ensure_future(caller()) for _ in range(16)]
        await warm.wait()
        served.process.send_signal(signal.SIGTERM)
        refusals = await asyncio.gather(*callers)
    assert {error.code() for error in refusals} == {grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(served.process.wait, START_SECONDS) == 0


def test_workers_share_a_port_and_a_page_of_metrics(serve: Any) -> None:
    served = serve("embed", "--workers", "2")
    assert len(set(create(served.address, 24))) == 1
    page = served.page("metrics")
    for worker in "01":
        assert f'searchfoundation_model_load_seconds{{model="all-MiniLM-L6-v2",worker="{worker}"}}' in page
    counted = [
        line
        for line in page.splitlines()
        if line.startswith("searchfoundation_requests_total") and "embed" in line
    ]
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == 24
    assert served.page("ready") == '{"status":"ok"}'
    workers = served.workers()
    assert len(workers) == 2
    assert served.end() == 0
    assert "each of the 2 workers keeps limits of its own" in served.log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_worker_that_dies_takes_the_group_down(serve: Any) -> None:
    served = serve("embed", workers=2)
    served.ports()
    first, second = served.workers()
    os.kill(first, signal.SIGKILL)
    assert served.process.wait(START_SECONDS) == 1
    assert not Path(f"/proc/{second}").exists()
    assert not served.ports_file.exists()
    assert "worker 0 ended with status -9" in served.log.read_text()


def test_workers_end_when_their_parent_is_killed(serve: Any) -> None:
    served = serve("embed", workers=2)
    served.ports()
    workers = served.workers()
    served.process.kill()
    deadline = time.monotonic() + START_SECONDS
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_taken_port_is_told_before_models_load(serve: Any, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        served = serve("embed", grpc_port=port, workers=workers)
        assert served.process.wait(START_SECONDS) == 1
    text = served.log.read_text()
    assert text.splitlines()[-1].startswith(f"Cannot listen on 127.0.0.1:{port}")
    assert "is ready on" not in text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_had_is_told_in_a_sentence(serve: Any, tmp_path: Path, workers: int) -> None:
    served = serve("embed", models='["no-such-model"]', workers=workers)
    assert served.process.wait(START_SECONDS) == 1
    text = served.log.read_text()
    assert "no-such-model" in text
    assert "Traceback" not in text


def test_a_wrong_setting_ends_with_status_2(serve: Any) -> None:
    served = serve("embed", grpc_port="many")
    assert served.process.wait(START_SECONDS) == 2
    assert "SF_GRPC_PORT" in served.log.read_text()


def test_an_unknown_capability_is_refused(serve: Any) -> None:
    served = serve("cook")
    assert served.process.wait(START_SECONDS) == 2
    assert "cook" in served.log.read_text()

"""Worker processes to be killed: ``search-foundation serve batch``, forked from one that has imported it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc, batch_rest_pb2_grpc

from tests.servers import free_port

MODEL = "all-MiniLM-L6-v2"
POISON = "this text ends the process"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.batch.preload"])
_START_SECONDS = 180.0


@dataclass
class Worker:
    """One process on ports of its own; ``settings`` are SF_* variables."""

    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str = "worker"
    poisoned: bool = False
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    process: Any = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        environment = {
            "SF_DATA_DIR": str(self.folder / "data"),
            "SF_AUTH": "false",
            "SF_MODELS": json.dumps([MODEL]),
            "SF_GRPC_PORT": str(self.port),
            "SF_METRICS_PORT": str(self.metrics_port),
            "SF_DRAIN_SECONDS": "0",
            "SF_ACCESS_LOG": "false",
            "SF_BATCH_CHUNK_TOKENS": "200",
            "SF_WORKER_ID": self.name,
            **self.settings,
        }
        self.process = _context.Process(target=run, args=(environment, str(self.log), self.poisoned))
        self.process.start()

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._serves():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def _serves(self) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    def figure(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 while there is none."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=100) as answer:
            page = answer.read().decode()
        samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name and sample.labels == labels)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.terminate()
            self.process.join(20)
            if self.process.is_alive():
                self.kill()
                raise AssertionError(f"did not stop on SIGTERM: {self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]


@dataclass
class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends a key with each call."""

    key: str

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=(("authorization", f"Bearer {self.key}"),))


@dataclass
class Client:
    """What a caller of one worker does, with a ``key`` where one is wanted."""

    worker: Worker
    key: str = ""

    def __enter__(self) -> Client:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.worker.port}")
        channel = grpc.intercept_channel(self._channel, _Bearer(self.key)) if self.key else self._channel
        self.rest = batch_rest_pb2_grpc.BatchRestServiceStub(channel)
        self.typed = batch_pb2_grpc.BatchServiceStub(channel)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def submit(self, *, once: bool = False, **fields: Any) -> str:
        body = httpbody_pb2.HttpBody(data=orjson.dumps({"model": MODEL, **fields}))
        self.worker.wait_until_serving()
        if once:
            made = self.rest.CreateBatch(body, timeout=_START_SECONDS)
        else:
            made = self._available(self.rest.CreateBatch, body)
        return orjson.loads(made.data)["batch_id"]

    def cancel(self, job_id: str) -> batch_pb2.Batch:
        return self._available(self.typed.CancelBatch, batch_pb2.CancelBatchRequest(id=job_id))

    def status(self, job_id: str) -> batch_pb2.Batch:
        self.worker.wait_until_serving()
        request = batch_pb2.GetBatchRequest(id=job_id)
        return self._available(self.typed.GetBatch, request)

    @staticmethod
    def _available(method: Any, request: Any) -> Any:
        """Call again while the server says that something it needs is away."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return method(request, wait_for_ready=True, timeout=_START_SECONDS)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def wait(self, job_id: str, seconds: float = 60.0) -> batch_pb2.Batch:
        """Wait for the end of a job."""
        deadline = time.monotonic() + seconds
        while (status := self.status(job_id)).completed.seconds == 0:
            assert time.monotonic() < deadline, f"{status} after {seconds:g} s\n{self.worker.text()}"
            time.sleep(0.05)
        return status

    def wait_for_lines(self, job_id: str, number: int, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while self.status(job_id).succeeded < number:
            assert time.monotonic() < deadline, self.worker.text()
            time.sleep(0.02)

    def download(self, job_id: str, file: int = batch_pb2.BATCH_FILE_OUTPUT, offset: int = 0) -> bytes:
        request = batch_pb2.DownloadBatchRequest(id=job_id, file=file, offset=offset)
        return b"".join(piece.data for piece in self.typed.DownloadBatch(request, timeout=180))


def run(environment: Mapping[str, str], log: str, poisoned: bool) -> None:
    """Be the worker process."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in os.environ if name.startswith("SF_")]:
        del os.environ[name]
    os.environ.update(environment)
    if poisoned:
        _poison()
    from search_foundation.cli import main

    sys.exit(main(["serve", "batch"]))


def _poison() -> None:
    from services.core.inference import EmbeddingModel

    embed = EmbeddingModel.embed

    async def deadly(self: Any, texts: Any, *arguments: Any) -> Any:
        if POISON in texts:
            os._exit(9)
        return await embed(self, texts, *arguments)

    EmbeddingModel.embed = deadly  # type: ignore[method-assign]

"""A batch job over SQLite beside the engine alone, what it adds in memory, and what others notice of it.

``python -m benchmarks.batch`` runs one service process with the embedding and the batch capability behind the
gateway. A job's speed is from its creation to its end, everything included; the engine alone is measured in
this process before and after it, since the speed of shared machines drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc, common_pb2

from benchmarks.footprint import resident_mib
from services.core.call import Call, Priority
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine
from services.core.settings import Settings
from tests.stack import MODEL, Stack

_TOKENS = 64
_CHUNK_LINES = 160
_AT_ONCE = 3
_LISTED = 1_000
_PAUSE_SECONDS = 0.005
_IDLE_SECONDS = 10.0
_WORDS = ("river", "stone", "light", "engine", "paper", "garden", "cloud", "music", "table", "winter")


def texts(count: int) -> list[str]:
    """Texts of 64 tokens, specials included."""
    return [" ".join(_WORDS[(n + k * k) % len(_WORDS)] for k in range(_TOKENS - 2)) for n in range(count)]


async def engine_alone(given: Sequence[str]) -> float:
    """Tokens a second of the engine in this process."""
    engine = await Engine.start(Settings(models=(MODEL,), auth=False), Catalog.load())
    try:
        model = engine.embedder(MODEL)
        parts = [given[n : n + _CHUNK_LINES] for n in range(0, len(given), _CHUNK_LINES)]
        left = iter(parts)

        async def work() -> int:
            tokens = 0
            for part in left:
                call = Call("benchmark", priority=Priority.BATCH)
                tokens += sum((await model.embed(part, EmbedOptions(), call)).token_counts)
            return tokens

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(work() for _ in range(_AT_ONCE))))
        return tokens / (time.perf_counter() - began)
    finally:
        await engine.stop(5.0)


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens a second of a job, and the memory it added in MiB."""

    tokens_per_second: float
    added_mib: float


class Jobs:
    """Jobs of one running system."""

    def __init__(self, stub: batch_pb2_grpc.BatchServiceStub, pid: int, http: httpx.Client) -> None:
        self._stub = stub
        self._pid = pid
        self._http = http

    def run(self, given: Sequence[str], meanwhile: Callable[[], object] = lambda: time.sleep(0.5)) -> Job:
        """Do a job to its end, and something else over and over until then."""
        before = peak = resident_mib(self._pid)
        self._stub.CreateBatch(_request(given))
        while not (newest := self._newest()).completed.seconds:
            peak = max(peak, resident_mib(self._pid))
            meanwhile()
        seconds = 1e-9 * (newest.completed.ToNanoseconds() - newest.created.ToNanoseconds())
        assert newest.succeeded == len(given)
        return Job(newest.total_tokens / seconds, peak - before)

    def listing(self) -> float:
        """Milliseconds to list as many jobs as may be asked for, most of them still queued."""
        for _ in range(_LISTED):
            self._stub.CreateBatch(_request(["x"]))
        request = batch_pb2.ListBatchesRequest(limit=_LISTED)
        times: list[float] = []
        for _ in range(9):
            began = time.perf_counter()
            assert len(self._stub.ListBatches(request).batches) == _LISTED
            times.append(time.perf_counter() - began)
        return 1e3 * sorted(times)[len(times) // 2]

    def quiet_calls(self, seconds: float) -> list[float]:
        """Latencies in ms of a caller who sends one text at a time over REST, with a pause after each."""
        body = {"model": MODEL, "input": texts(1)}
        latencies: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            self._http.post("/v1/embeddings", json=body).raise_for_status()
            latencies.append(1e3 * (time.perf_counter() - began))
            time.sleep(_PAUSE_SECONDS)
        return latencies

    def _newest(self) -> batch_pb2.Batch:
        return self._stub.ListBatches(batch_pb2.ListBatchesRequest(limit=1)).batches[0]


@contextmanager
def system() -> Generator[Jobs]:
    """One process with both capabilities, behind the gateway."""
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder), {"SF_AUTH": "false"}) as stack:
        services = stack.serve("embed", "batch")
        stack.gateway()
        options = (("grpc.max_receive_message_length", -1),)
        with (
            grpc.insecure_channel(services.address, options) as channel,
            httpx.Client(base_url=stack.url, timeout=60) as http,
        ):
            stub = batch_pb2_grpc.BatchServiceStub(channel)
            yield Jobs(stub, services.command.process.pid, http)


def _request(given: Sequence[str]) -> batch_pb2.CreateBatchRequest:
    lines = [
        batch_pb2.BatchLine(custom_id=str(n), inputs=[common_pb2.Content(text=one)])
        for n, one in enumerate(given)
    ]
    return batch_pb2.CreateBatchRequest(model=MODEL, input=batch_pb2.BatchLines(lines=lines))


def _p95(latencies: Sequence[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.95)]


def report(count: int) -> str:
    """The table."""
    given = texts(count)
    half = len(given) // 2
    with system() as jobs:
        jobs.run(given[:500])
        before = asyncio.run(engine_alone(given[:half]))
        whole = jobs.run(given)
        after = asyncio.run(engine_alone(given[half:]))
        idle = jobs.quiet_calls(_IDLE_SECONDS)
        beside: list[float] = []
        shared = jobs.run(given, lambda: beside.extend(jobs.quiet_calls(0.5)))
        listing = jobs.listing()
    alone = (before + after) / 2
    return "\n".join(
        (
            "| figure | value |",
            "| --- | --- |",
            f"| engine alone, before and after the job | {before:,.0f} and {after:,.0f} tokens/s |",
            f"| a job of {count:,} texts of {_TOKENS} tokens | {whole.tokens_per_second:,.0f} tokens/s |",
            f"| job / engine | {whole.tokens_per_second / alone:.0%} |",
            f"| memory added by the job | {whole.added_mib:.0f} MiB |",
            f"| REST call of one text, nothing else going on | p95 {_p95(idle):.1f} ms of {len(idle)} |",
            f"| the same beside a job | p95 {_p95(beside):.1f} ms of {len(beside)} |",
            f"| p95 beside a job / idle | {_p95(beside) / _p95(idle):.2f} |",
            f"| the job beside these calls | {shared.tokens_per_second:,.0f} tokens/s |",
            f"| listing 1,000 jobs, newest queued | {listing:.0f} ms |",
        )
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=10_000)
    print(report(parser.parse_args().texts))


if __name__ == "__main__":
    main()

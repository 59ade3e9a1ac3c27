"""Batch jobs: throughput beside the engine's own, memory, and listing.

``python -m benchmarks.batch [--texts N]`` prints the table: one job of up to 10,000 texts of 64 tokens, over
SQLite, in a process of its own; and the engine alone with the same texts, in parts as large as chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc, common_pb2

from benchmarks.footprint import resident_mib
from services.core.call import Call, Priority
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine
from services.core.settings import Settings
from tests.stack import MODEL, Stack

_TOKENS = 64
_CHUNK_LINES = 96
_AT_ONCE = 2
_LISTED = 1_000
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


def job(given: Sequence[str]) -> tuple[float, float, float]:
    """Tokens a second of a job, the memory it added in MiB, and milliseconds to list 1,000 jobs."""
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder), {"SF_AUTH": "false"}) as stack:
        services = stack.serve("batch")
        pid = services.command.process.pid
        with grpc.insecure_channel(services.address, (("grpc.max_receive_message_length", -1),)) as channel:
            stub = batch_pb2_grpc.BatchServiceStub(channel)
            stub.CreateBatch(_request(given[:500]))
            _wait(stub)
            before = peak = resident_mib(pid)
            began = time.perf_counter()
            stub.CreateBatch(_request(given))
            while True:
                newest = stub.ListBatches(batch_pb2.ListBatchesRequest(limit=1)).batches[0]
                peak = max(peak, resident_mib(pid))
                if newest.completed.seconds:
                    break
                time.sleep(0.1)
            seconds = time.perf_counter() - began
            listing = _listing(stub)
        return newest.total_tokens / seconds, peak - before, listing


def _listing(stub: batch_pb2_grpc.BatchServiceStub) -> float:
    for _ in range(_LISTED):
        stub.CreateBatch(_request(["x"]))
    request = batch_pb2.ListBatchesRequest(limit=_LISTED)
    times: list[float] = []
    for _ in range(9):
        began = time.perf_counter()
        assert len(stub.ListBatches(request).batches) == _LISTED
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[len(times) // 2]


def _wait(stub: batch_pb2_grpc.BatchServiceStub) -> None:
    while not stub.ListBatches(batch_pb2.ListBatchesRequest(limit=1)).batches[0].completed.seconds:
        time.sleep(0.1)


def _request(given: Sequence[str]) -> batch_pb2.CreateBatchRequest:
    lines = [
        batch_pb2.BatchLine(custom_id=str(n), inputs=[common_pb2.Content(text=one)])
        for n, one in enumerate(given)
    ]
    return batch_pb2.CreateBatchRequest(model=MODEL, input=batch_pb2.BatchLines(lines=lines))


def report(count: int) -> str:
    """The table."""
    given = texts(count)
    alone = asyncio.run(engine_alone(given))
    through, added, listing = job(given)
    return "\n".join(
        (
            "| figure | value |",
            "| --- | --- |",
            f"| engine alone | {alone:,.0f} tokens/s |",
            f"| a job of {count:,} texts of {_TOKENS} tokens | {through:,.0f} tokens/s |",
            f"| job / engine | {through / alone:.0%} |",
            f"| memory added by the job | {added:.0f} MiB |",
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

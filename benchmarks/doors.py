"""The running system, seen through its doors: typed gRPC, and REST through Envoy.

``python -m benchmarks.doors`` prints rows as JSON. The services and the gateway are started by the commands a
user runs. gRPC is loaded by grpc.aio with messages made beforehand and answers left unparsed; REST by wrk,
which costs the two cores far less than a Python client would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import grpc.aio
from searchfoundation.v1 import common_pb2, embed_pb2

from benchmarks.workload import CONCURRENCIES, TEXTS_IN_ONE_CALL, WORKLOADS, Row, row, texts_of
from tests.stack import MODEL, Stack

SECONDS = 2.0
_POOL = 512
_METHOD = "/searchfoundation.v1.EmbedService/Embed"

_WRK = """
local bodies, at = {}, 0
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, bodies[at])
end
done = function(summary, latency)
  io.write(string.format('{"calls": %%d, "micros": %%d, "p50": %%d, "p95": %%d, "failed": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(95),
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
"""


def shapes() -> list[tuple[int, int]]:
    """Calls in flight and texts in each."""
    return [(calls, 1) for calls in CONCURRENCIES] + [(1, TEXTS_IN_ONE_CALL)]


def _pool(workload: str, texts: int) -> tuple[list[list[str]], float]:
    """The calls to send in turn, and the mean tokens of one."""
    all_texts, counts = texts_of(workload, max(_POOL, texts))
    calls = [all_texts[i : i + texts] for i in range(0, len(all_texts), texts)]
    return calls, sum(counts) / len(calls)


async def grpc_rows(address: str, seconds: float) -> list[Row]:
    """Load the typed door."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        embed = channel.unary_unary(_METHOD)
        return [
            await _grpc_row(embed, workload, calls, texts, seconds)
            for workload in WORKLOADS
            for calls, texts in shapes()
        ]


async def _grpc_row(embed, workload: str, calls: int, texts: int, seconds: float) -> Row:
    pool, tokens = _pool(workload, texts)
    messages = cycle(
        embed_pb2.EmbedRequest(
            model=MODEL, inputs=[common_pb2.Content(text=t) for t in batch]
        ).SerializeToString()
        for batch in pool
    )
    for _ in range(3):
        await embed(next(messages))
    latencies: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            message = next(messages)
            sent = time.perf_counter()
            await embed(message)
            latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(client() for _ in range(calls)))
    took = time.perf_counter() - began
    return row("grpc", workload, calls, texts, round(tokens * len(latencies)), took, latencies)


def rest_rows(url: str, folder: Path, seconds: float) -> list[Row]:
    """Load the REST door; errors as ``load``."""
    return [
        load(f"{url}/v1/embeddings", folder, workload, calls, texts, seconds)
        for workload in WORKLOADS
        for calls, texts in shapes()
    ]


def load(url: str, folder: Path, workload: str, calls: int, texts: int, seconds: float) -> Row:
    """Load ``url`` with embedding calls. RuntimeError when wrk is missing or a call fails."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("benchmarks of REST need wrk: apt-get install wrk")
    pool, tokens = _pool(workload, texts)
    bodies = folder / "bodies"
    bodies.write_text("".join(json.dumps({"model": MODEL, "input": batch}) + "\n" for batch in pool))
    script = folder / "load.lua"
    script.write_text(_WRK % {"bodies": bodies})
    command = [wrk, "-t1", f"-c{calls}", "--timeout", "30s", "-s", str(script), url]
    subprocess.run([*command, "-d1s"], check=True, capture_output=True)
    whole_calls = seconds if texts == 1 else 4 * seconds
    answer = subprocess.run(
        [*command, f"-d{max(1, round(whole_calls))}s"], check=True, capture_output=True, text=True
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    if found["failed"] or not found["calls"]:
        raise RuntimeError(f"calls failed: {found}")
    took = found["micros"] / 1e6
    return Row(
        "rest",
        workload,
        calls,
        texts,
        texts_per_second=found["calls"] * texts / took,
        tokens_per_second=found["calls"] * tokens / took,
        p50_ms=found["p50"] / 1e3,
        p95_ms=found["p95"] / 1e3,
    )


def rows(seconds: float = SECONDS) -> list[Row]:
    """Start the system and load both doors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Stack(folder, {"SF_AUTH": "false", "SF_ACCESS_LOG": "false"}) as stack:
            services = stack.serve()
            stack.gateway()
            measured = asyncio.run(grpc_rows(services.address, seconds))
            return measured + rest_rows(stack.url, folder, seconds)


def main() -> None:
    """Print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of one measurement")
    print(json.dumps([asdict(each) for each in rows(parser.parse_args().seconds)]))


if __name__ == "__main__":
    main()

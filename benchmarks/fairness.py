"""What a quiet tenant notices of a loud one, and an interactive one of batch work.

``python -m benchmarks.fairness`` prints the latency of one caller of 64-token texts: alone, beside a tenant
who sends 50 times as much, and beside batch work that never ends, all on one engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Sequence

from benchmarks.workload import SPECIALS
from services.core.call import Call, Priority
from services.core.catalog import Catalog
from services.core.inference import EmbeddingModel, EmbedOptions, Engine
from services.core.settings import Settings

MODEL = "all-MiniLM-L6-v2"
SECONDS = 6.0
LOUD = 50
_TEXT = " ".join(["river"] * (64 - SPECIALS))


async def _once(model: EmbeddingModel, tenant: str, priority: Priority, texts: Sequence[str]) -> float:
    began = time.perf_counter()
    await model.embed(texts, EmbedOptions(), Call("benchmark", key_id=tenant, priority=priority))
    return time.perf_counter() - began


async def _quiet(model: EmbeddingModel, seconds: float) -> list[float]:
    """Latencies of a caller who sends one text at a time, with a pause after each."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        latencies.append(await _once(model, "quiet", Priority.INTERACTIVE, [_TEXT]))
        await asyncio.sleep(0.005)
    return sorted(latencies)


async def _endless(model: EmbeddingModel, priority: Priority, texts: int) -> None:
    while True:
        await _once(model, "loud", priority, [_TEXT] * texts)


async def _beside(model: EmbeddingModel, seconds: float, callers: int, priority: Priority) -> list[float]:
    texts = 1 if priority is Priority.INTERACTIVE else 64
    loud = [asyncio.create_task(_endless(model, priority, texts)) for _ in range(callers)]
    try:
        await asyncio.sleep(0.5)
        return await _quiet(model, seconds)
    finally:
        for task in loud:
            task.cancel()
        for task in loud:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def measure(seconds: float) -> list[tuple[str, list[float]]]:
    """Sorted latencies in seconds: alone, beside a loud tenant, beside batch work."""
    engine = await Engine.start(Settings(models=(MODEL,)), Catalog.load())
    model = engine.embedder(MODEL)
    try:
        return [
            ("alone", await _quiet(model, seconds)),
            (
                f"beside a tenant with {LOUD} calls in flight",
                await _beside(model, seconds, LOUD, Priority.INTERACTIVE),
            ),
            ("beside endless batch work", await _beside(model, seconds, 2, Priority.BATCH)),
        ]
    finally:
        await engine.stop(2.0)


def table(measured: list[tuple[str, list[float]]]) -> str:
    """The latencies as Markdown, with the ratio of each p95 to that of the caller alone."""

    def at(latencies: list[float], part: float) -> float:
        return 1e3 * latencies[min(len(latencies) - 1, int(len(latencies) * part))]

    idle = at(measured[0][1], 0.95)
    lines = ["| quiet caller | p50 ms | p95 ms | p95 / alone |", "| --- | --- | --- | --- |"]
    for name, latencies in measured:
        p95 = at(latencies, 0.95)
        lines.append(f"| {name} | {at(latencies, 0.5):.1f} | {p95:.1f} | {p95 / idle:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of one measurement")
    print(table(asyncio.run(measure(parser.parse_args().seconds))))


if __name__ == "__main__":
    main()

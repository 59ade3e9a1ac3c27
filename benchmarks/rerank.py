"""Reranking in process against sentence-transformers on the same machine, documents and arithmetic.

``python -m benchmarks.rerank`` prints the table; ``rows()`` is for the table of all doors. One call ranks 100
documents of 128 tokens by a query of 16; both sides embed the query and all documents, take the cosines and
order the documents. Every call has documents of its own. The library takes one call at a time: calls in
flight wait for one another, and those that still wait when the time is over are not begun.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from typing import Any

from benchmarks.workload import Row, row, texts_of

MODEL = "all-MiniLM-L6-v2"
CONCURRENCIES = (1, 16)
DOCUMENTS = 100
SECONDS = 4.0
_POOL = 24

Rank = Callable[[str, list[str]], Awaitable[object]]
"""Orders the documents of one call."""


def rows(seconds: float = SECONDS) -> list[Row]:
    """All rows, each variant in a process of its own; ``texts`` are the documents of a call."""
    return [measured for variant in VARIANTS for measured in _in_process(variant, seconds)]


async def measure(variant: str, rank: Rank, seconds: float, *, serial: bool) -> list[Row]:
    """Measure ``rank`` at every concurrency; ``serial`` says that it blocks the loop while it runs."""
    return [await _measure(variant, rank, calls, seconds, serial) for calls in CONCURRENCIES]


async def _measure(variant: str, rank: Rank, calls: int, seconds: float, serial: bool) -> Row:
    pool = _calls()
    query, documents, _ = next(pool)
    await rank(query, documents)
    latencies: list[float] = []
    tokens = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal tokens
        while time.perf_counter() - began < seconds:
            query, documents, size = next(pool)
            sent = time.perf_counter()
            await rank(query, documents)
            latencies.append(time.perf_counter() - sent)
            tokens += size

    clients = [asyncio.create_task(client()) for _ in range(calls)]
    _, waiting = await asyncio.wait(clients, timeout=seconds if serial else None)
    elapsed = time.perf_counter() - began
    for each in waiting:
        each.cancel()
    return row(variant, "rerank-128", calls, DOCUMENTS, tokens, elapsed, latencies)


def _calls() -> Iterator[tuple[str, list[str], int]]:
    queries, query_tokens = texts_of("16", _POOL)
    texts, tokens = texts_of("128", _POOL * DOCUMENTS)
    parts = [slice(i * DOCUMENTS, (i + 1) * DOCUMENTS) for i in range(_POOL)]
    return cycle(
        [(queries[i], texts[part], query_tokens[i] + sum(tokens[part])) for i, part in enumerate(parts)]
    )


async def _engine(seconds: float) -> list[Row]:
    from services.core.call import Call
    from services.core.catalog import Catalog
    from services.core.inference import Engine
    from services.core.settings import Settings
    from services.rerank.logic import Reranker
    from services.rerank.types import RerankRequest

    engine = await Engine.start(Settings(models=(MODEL,)), Catalog.load())
    reranker = Reranker(engine)

    async def rank(query: str, documents: list[str]) -> object:
        return await reranker.rank(RerankRequest(MODEL, query, documents), Call("benchmark"))

    try:
        return await measure("engine", rank, seconds, serial=False)
    finally:
        await engine.stop(1.0)


async def _sentence_transformers(variant: str, dtype: str, seconds: float) -> list[Row]:
    from sentence_transformers import SentenceTransformer

    from services.core.catalog import Catalog
    from services.core.catalog.weights import locate
    from services.core.settings import Settings

    folder = locate(Catalog.load().require(MODEL), Settings())
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    turn = asyncio.Lock()

    async def rank(query: str, documents: list[str]) -> object:
        async with turn:
            vectors = model.encode([query, *documents], normalize_embeddings=True, convert_to_tensor=True)
            return (vectors[1:] @ vectors[0]).argsort(descending=True, stable=True).tolist()

    return await measure(variant, rank, seconds, serial=True)


VARIANTS: dict[str, Callable[[float], Any]] = {
    "st-fp32": lambda seconds: _sentence_transformers("st-fp32", "float32", seconds),
    "st-bf16": lambda seconds: _sentence_transformers("st-bf16", "bfloat16", seconds),
    "engine": _engine,
}


def _in_process(variant: str, seconds: float) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.rerank", "--only", variant, "--seconds", str(seconds)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return [Row(**fields) for fields in json.loads(printed)]


def table(measured: list[Row]) -> str:
    """A Markdown table: documents/s of each variant and the engine's ratios."""
    cells = {(r.variant, r.calls): r for r in measured}
    lines = [
        "| calls | st fp32 docs/s | st bf16 docs/s | engine docs/s | x fp32 | x bf16 | p50 ms | p95 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for calls in CONCURRENCIES:
        fp32, bf16 = (cells[name, calls].texts_per_second for name in ("st-fp32", "st-bf16"))
        ours = cells["engine", calls]
        speed = ours.texts_per_second
        lines.append(
            f"| {calls} | {fp32:,.0f} | {bf16:,.0f} | {speed:,.0f} | {speed / fp32:.1f} | {speed / bf16:.1f} "
            f"| {ours.p50_ms:,.0f} | {ours.p95_ms:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or with ``--only`` the rows of one variant as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=VARIANTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of one measurement")
    chosen = parser.parse_args()
    if chosen.only:
        measured: list[Row] = asyncio.run(VARIANTS[chosen.only](chosen.seconds))
        print(json.dumps([asdict(each) for each in measured]))
    else:
        print(table(rows(chosen.seconds)))


if __name__ == "__main__":
    main()

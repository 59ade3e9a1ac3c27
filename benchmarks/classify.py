"""Classifying in process: zero-shot beside embedding the same texts, training beside embedding examples.

``python -m benchmarks.classify`` prints the figures; ``rows()`` is for the table of all doors. Both sides of
the first comparison end with the JSON of the answer, and the labels' vectors are known. Training includes the
database, a SQLite file on the disk of the temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workload import Row, row, texts_of

MODEL = "all-MiniLM-L6-v2"
LABELS = 64
EXAMPLES, CLASSES, ITERATIONS = 512, 16, 10
SECONDS = 1.0
_ROUNDS = 5
_TRAININGS = 9
_POOL = 512
_SHAPES = (("16", 16, 1), ("128", 16, 1), ("16", 1, 256))
"""Workload, calls in flight, texts in each."""

Answer = Callable[[list[str]], Awaitable[object]]
"""Makes the answer to one call with these texts."""


def rows(seconds: float = SECONDS) -> list[Row]:
    """All rows: variants ``embed``, ``classify-64``, ``embed-examples`` and ``train``."""
    command = [sys.executable, "-m", "benchmarks.classify", "--json", "--seconds", str(seconds)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Row(**fields) for fields in json.loads(output.splitlines()[-1])]


async def measure(seconds: float) -> list[Row]:
    """Take both comparisons, turn by turn, so that a noisy moment meets both sides; medians count."""
    async with _parts() as (embed, classify, embed_examples, train):
        found = [
            each
            for shape in _SHAPES
            for each in await _compare(shape, seconds, {"embed": embed, "classify-64": classify})
        ]
        # Short examples: the longer they are, the less learning is beside embedding.
        texts, counts = texts_of("16", EXAMPLES)
        sides = {"embed-examples": embed_examples, "train": train}
        return found + await _times(sides, texts, sum(counts))


async def _compare(shape: tuple[str, int, int], seconds: float, sides: dict[str, Answer]) -> list[Row]:
    rounds: dict[str, list[Row]] = {name: [] for name in sides}
    for _ in range(_ROUNDS):
        for name, answer in sides.items():
            rounds[name].append(await _throughput(name, answer, shape, seconds))
    return [sorted(each, key=lambda r: r.texts_per_second)[_ROUNDS // 2] for each in rounds.values()]


async def _throughput(name: str, answer: Answer, shape: tuple[str, int, int], seconds: float) -> Row:
    workload, calls, texts = shape
    pool, counts = texts_of(workload, max(_POOL, texts))
    await answer(pool[:texts])
    latencies: list[float] = []
    tokens = place = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal tokens, place
        while time.perf_counter() - began < seconds:
            first = place = (place + texts) % (len(pool) - texts + 1)
            sent = time.perf_counter()
            await answer(pool[first : first + texts])
            latencies.append(time.perf_counter() - sent)
            tokens += sum(counts[first : first + texts])

    await asyncio.gather(*(client() for _ in range(calls)))
    return row(name, workload, calls, texts, tokens, time.perf_counter() - began, latencies)


async def _times(sides: dict[str, Answer], texts: list[str], tokens: int) -> list[Row]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + _TRAININGS):
        for name, answer in sides.items():
            began = time.perf_counter()
            await answer(texts)
            taken[name].append(time.perf_counter() - began)
    middles = {name: median(each[1:]) for name, each in taken.items()}
    return [row(name, "16", 1, len(texts), tokens, each, [each]) for name, each in middles.items()]


@asynccontextmanager
async def _parts() -> AsyncIterator[tuple[Answer, Answer, Answer, Answer]]:
    """Give what makes the answers of: embedding, zero-shot, embedding of examples, training."""
    from services.classify.few_shot import ClassifierLimits, FewShot
    from services.classify.rest import response_body as classified
    from services.classify.schema import Access, LabelGroup, TrainRequest, ZeroShotRequest
    from services.classify.table import CLASSIFIERS, ClassifierTable
    from services.classify.zero_shot import ZeroShot
    from services.core.call import Call
    from services.core.catalog import Catalog
    from services.core.inference import EmbedOptions, Engine, finish
    from services.core.serving.rest import encode
    from services.core.settings import Settings
    from services.core.storage import Database

    engine = await Engine.start(Settings(models=(MODEL,)), Catalog.load())
    model = engine.embedder(MODEL)
    executor = ThreadPoolExecutor(1)
    zero_shot = ZeroShot(engine, executor, 64 << 20)
    words, _ = texts_of("16", LABELS, seed=1)
    groups = (LabelGroup(tuple(" ".join(text.split()[:3]) + f" {i}" for i, text in enumerate(words))),)

    async def embed_examples(texts: list[str]) -> Any:
        return finish((await model.embed(texts, EmbedOptions(), Call("benchmark"))).vectors)

    async def embed(texts: list[str]) -> object:
        vectors = enumerate(await embed_examples(texts))
        return encode([{"object": "embedding", "index": i, "embedding": each} for i, each in vectors])

    async def classify(texts: list[str]) -> object:
        result = await zero_shot.classify(ZeroShotRequest(MODEL, texts, groups), Call("benchmark"))
        return encode(await classified(result, len(texts)))

    with tempfile.TemporaryDirectory() as folder:
        database = await Database.open(Settings(data_dir=Path(folder)), CLASSIFIERS)
        few_shot = FewShot(engine, ClassifierTable(database), executor, ClassifierLimits(10_000, CLASSES))

        async def train(texts: list[str]) -> object:
            labels = [f"label {i % CLASSES}" for i in range(len(texts))]
            request = TrainRequest(MODEL, texts, labels, Access.PRIVATE, ITERATIONS)
            return await few_shot.train(request, Call("benchmark"))

        try:
            yield embed, classify, embed_examples, train
        finally:
            await database.close()
            executor.shutdown()
            await engine.stop(1.0)


def table(measured: list[Row]) -> str:
    """Two Markdown tables, one for each comparison."""
    cells: dict[tuple[str, str, int, int], Row] = {
        (r.variant, r.workload, r.calls, r.texts): r for r in measured
    }
    lines = ["| tokens | calls x texts | embed texts/s | classify texts/s | ratio |", "|---|---|---|---|---|"]
    for (variant, workload, calls, texts), ours in cells.items():
        if variant == "classify-64":
            base, speed = cells["embed", workload, calls, texts].texts_per_second, ours.texts_per_second
            lines.append(
                f"| {workload} | {calls} x {texts} | {base:,.0f} | {speed:,.0f} | {speed / base:.1%} |"
            )
    lines += ["", "| tokens | examples | embed ms | train ms | ratio |", "|---|---|---|---|---|"]
    for (variant, workload, calls, texts), ours in cells.items():
        if variant == "train":
            base = cells["embed-examples", workload, calls, texts].p50_ms
            lines.append(
                f"| {workload} | {texts} | {base:.0f} | {ours.p50_ms:.0f} | {ours.p50_ms / base:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows for the table of all doors")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of one of five rounds")
    chosen: Any = parser.parse_args()
    measured = asyncio.run(measure(chosen.seconds))
    print(json.dumps([asdict(each) for each in measured]) if chosen.json else table(measured))


if __name__ == "__main__":
    main()

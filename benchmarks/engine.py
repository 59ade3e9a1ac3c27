"""The engine in process against sentence-transformers on the same machine and texts.

``python -m benchmarks.engine`` prints the table; ``rows()`` is for the table of all doors.
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

from benchmarks.workload import CONCURRENCIES, TEXTS_IN_ONE_CALL, WORKLOADS, Row, row, texts_of

MODEL = "all-MiniLM-L6-v2"
SECONDS = 1.5
_POOL = 512

Encode = Callable[[list[str]], Awaitable[object]]
"""Embeds the texts of one call."""


def rows(seconds: float = SECONDS) -> list[Row]:
    """All rows of all variants, each variant in a process of its own."""
    return [measured for variant in VARIANTS for measured in _in_process(variant, seconds)]


def ceiling() -> float:
    """Tokens/s that the bare bf16 products of the model's linear layers reach, at the best batch size."""
    return float(_run("ceiling", 0.0))


async def measure(variant: str, encode: Encode, seconds: float) -> list[Row]:
    """Measure ``encode`` on every workload, at every concurrency and in one large call."""
    shapes = [(calls, 1) for calls in CONCURRENCIES] + [(1, TEXTS_IN_ONE_CALL)]
    return [
        await _measure(variant, encode, workload, calls, texts, seconds)
        for workload in WORKLOADS
        for calls, texts in shapes
    ]


async def _measure(
    variant: str, encode: Encode, workload: str, calls: int, texts: int, seconds: float
) -> Row:
    pool = _calls(workload, texts)
    for _ in range(3 if texts == 1 else 1):
        await encode(next(pool)[0])
    latencies: list[float] = []
    tokens = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal tokens
        while time.perf_counter() - began < seconds:
            batch, size = next(pool)
            sent = time.perf_counter()
            await encode(batch)
            latencies.append(time.perf_counter() - sent)
            tokens += size

    await asyncio.gather(*(client() for _ in range(calls)))
    return row(variant, workload, calls, texts, tokens, time.perf_counter() - began, latencies)


def _calls(workload: str, texts: int) -> Iterator[tuple[list[str], int]]:
    all_texts, counts = texts_of(workload, max(_POOL, texts))
    starts = range(0, len(all_texts), texts)
    return cycle([(all_texts[i : i + texts], sum(counts[i : i + texts])) for i in starts])


async def _engine(seconds: float) -> list[Row]:
    from services.core.call import Call
    from services.core.catalog import Catalog
    from services.core.inference import EmbedOptions, Engine, finish
    from services.core.settings import Settings

    engine = await Engine.start(Settings(models=(MODEL,)), Catalog.load())
    model = engine.embedder(MODEL)
    options = EmbedOptions()

    async def encode(texts: list[str]) -> object:
        return finish((await model.embed(texts, options, Call("benchmark"))).vectors)

    try:
        return await measure("engine", encode, seconds)
    finally:
        await engine.stop(1.0)


async def _sentence_transformers(variant: str, dtype: str, seconds: float) -> list[Row]:
    """The library takes one call at a time: calls in flight wait for one another, as in a simple server."""
    from sentence_transformers import SentenceTransformer

    from services.core.catalog import Catalog
    from services.core.catalog.weights import locate
    from services.core.settings import Settings

    folder = locate(Catalog.load().require(MODEL), Settings())
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    turn = asyncio.Lock()

    async def encode(texts: list[str]) -> object:
        async with turn:
            return model.encode(texts, normalize_embeddings=True)

    return await measure(variant, encode, seconds)


def _ceiling() -> float:
    """Six layers of query, key, value, output, up and down projections, with all cores."""
    import torch
    from torch.nn.functional import linear

    shapes = ((3 * 384, 384), (384, 384), (4 * 384, 384), (384, 4 * 384))
    weights = [torch.randn(shape).bfloat16() for _ in range(6) for shape in shapes]
    best = 0.0
    with torch.inference_mode():
        for tokens in (128, 256, 512, 1024):
            inputs = {width: torch.randn(tokens, width).bfloat16() for width in (384, 4 * 384)}
            for _ in range(20):
                began = time.perf_counter()
                for weight in weights:
                    linear(inputs[weight.shape[1]], weight)
                best = max(best, tokens / (time.perf_counter() - began))
    return best


VARIANTS: dict[str, Callable[[float], Any]] = {
    "st-fp32": lambda seconds: _sentence_transformers("st-fp32", "float32", seconds),
    "st-bf16": lambda seconds: _sentence_transformers("st-bf16", "bfloat16", seconds),
    "engine": _engine,
}


def _in_process(variant: str, seconds: float) -> list[Row]:
    return [Row(**fields) for fields in json.loads(_run(variant, seconds))]


def _run(what: str, seconds: float) -> str:
    command = [sys.executable, "-m", "benchmarks.engine", "--only", what, "--seconds", str(seconds)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def table(measured: list[Row], top: float) -> str:
    """A Markdown table: tokens/s of each variant and the engine's ratios."""
    cells = {(r.variant, r.workload, r.calls, r.texts): r for r in measured}
    heads = ["tokens", "calls x texts", "st fp32 tok/s", "st bf16 tok/s", "engine tok/s", "x fp32", "x bf16"]
    heads += ["of ceiling", "engine texts/s", "p50 ms", "p95 ms"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for (variant, workload, calls, texts), ours in cells.items():
        if variant != "engine":
            continue
        fp32, bf16 = (
            cells[name, workload, calls, texts].tokens_per_second for name in ("st-fp32", "st-bf16")
        )
        speed = ours.tokens_per_second
        line = [workload, f"{calls} x {texts}", f"{fp32:,.0f}", f"{bf16:,.0f}", f"{speed:,.0f}"]
        line += [f"{speed / fp32:.1f}", f"{speed / bf16:.1f}", f"{speed / top:.0%}"]
        line += [f"{ours.texts_per_second:,.0f}", f"{ours.p50_ms:.1f}", f"{ours.p95_ms:.1f}"]
        lines.append(_line(line))
    return "\n".join([*lines, "", f"Ceiling (bare bf16 products): {top:,.0f} tokens/s"])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or with ``--only`` the rows of one variant as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*VARIANTS, "ceiling"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of one measurement")
    chosen = parser.parse_args()
    if chosen.only == "ceiling":
        print(_ceiling())
    elif chosen.only:
        measured: list[Row] = asyncio.run(VARIANTS[chosen.only](chosen.seconds))
        print(json.dumps([asdict(each) for each in measured]))
    else:
        print(table(rows(chosen.seconds), ceiling()))


if __name__ == "__main__":
    main()

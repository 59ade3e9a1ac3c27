"""Encoders of the larger text models on this machine, random weights: tokens/s, memory, what adapters cost.

    python -m benchmarks.encoders [--network v2|v3 ...]

Ours runs one single-threaded worker per core over shared weights, as the engine does. Beside it the plain
way: transformers' own class (for JinaBERT, which it does not have, the same in torch modules), a batch padded
to its longest text, a thread per core, in the same number format.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.padded import padded_jina_bert, padded_v3
from services.core.catalog import Catalog
from services.core.modeling.device import choose_dtype
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import Random
from tests.text_checkpoints import TASKS, write_jina_bert, write_v3

CORES = len(os.sched_getaffinity(0))
CPU = torch.device("cpu")
WORDS = 200
NAMES = {"v2": "jina-embeddings-v2-base-en", "v3": "jina-embeddings-v3"}
CASES = {
    "128": ((128, 128), 32),
    "8..248": ((8, 248), 32),
    "2,048": ((2048, 2048), 2),
    "64..4,032": ((64, 4032), 3),
}


def write(network: str, directory: Path) -> Path:
    """Make a checkpoint of published width and depth, but for the vocabulary."""
    if network == "v2":
        return write_jina_bert(
            directory,
            random=Random(gain=1.0),
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            num_hidden_layers=12,
            max_position_embeddings=8192,
        )
    return write_v3(
        directory,
        random=Random(gain=1.0),
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        max_position_embeddings=8194,
    )


def load(network: str, directory: Path) -> TextEncoder:
    spec = Catalog.load().require(NAMES[network])
    return load_text_encoder(spec, directory, device=CPU, dtype=choose_dtype(CPU))


def items(lengths: tuple[int, int], count: int, tasks: Sequence[str | None] = (None,)) -> list[EncodeItem]:
    chance = random.Random(0)
    ids = np.random.default_rng(0).integers(5, 29, (count, lengths[1]), dtype=np.int32)
    sizes = [chance.randint(*lengths) for _ in range(count)]
    return [EncodeItem(ids[i, :size], tasks[i % len(tasks)]) for i, size in enumerate(sizes)]


def speed(run: Callable[[list[EncodeItem]], object], batch: list[EncodeItem]) -> float:
    """Tokens per second after a small unmeasured run; of short runs the best of three."""
    run(items((64, 64), 2))
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 5:
        began = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - began)
    return sum(len(item.token_ids) for item in batch) / min(seconds)


class Workers:
    """Single-threaded workers over one encoder, the longest texts first."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, batch: list[EncodeItem]) -> None:
        ordered = sorted(batch, key=lambda item: -len(item.token_ids))
        list(self._pool.map(lambda part: self._encoder.forward(part), _cut(ordered)))


def _cut(ordered: list[EncodeItem]) -> list[list[EncodeItem]]:
    parts: list[list[EncodeItem]] = []
    room = 0
    for item in ordered:
        if not parts or len(item.token_ids) > room:
            parts.append([])
            room = 512
        parts[-1].append(item)
        room -= len(item.token_ids)
    return parts


def speeds(network: str, encoder: TextEncoder, directory: Path) -> list[str]:
    padded = (padded_jina_bert if network == "v2" else padded_v3)(directory, choose_dtype(CPU))
    lines = ["| network | tokens of a text | ours, tokens/s | padded, tokens/s | times |", "|" + " --- |" * 5]
    ours = Workers(encoder)
    for name, (lengths, count) in CASES.items():
        batch = items(lengths, count)
        mine, plain = speed(ours, batch), speed(padded, batch)
        lines.append(f"| {NAMES[network]} | {name} | {mine:,.0f} | {plain:,.0f} | {mine / plain:.2f} |")
    return lines


def adapters(encoder: TextEncoder) -> list[str]:
    """What a task costs against the base, and what a mix of tasks costs against one."""
    ours = Workers(encoder)
    cases = {"none": (None,), "one task": TASKS[:1], "five tasks and none, mixed": (None, *TASKS)}
    found = {name: speed(ours, items((128, 128), 36, tasks)) for name, tasks in cases.items()}
    none, one, mixed = found.values()
    return [
        "| adapters, 36 texts of 128 tokens | tokens/s | against |",
        "|" + " --- |" * 3,
        f"| none | {none:,.0f} | |",
        f"| one task | {one:,.0f} | {none / one - 1:+.1%} time against none |",
        f"| five tasks and none in one batch | {mixed:,.0f} | {one / mixed - 1:+.1%} time against one task |",
    ]


def memory(encoder: TextEncoder) -> str:
    """Memory that a text of 8,192 tokens takes above that of the loaded model."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before = _memory("VmRSS")
    encoder.forward(items((8192, 8192), 1))
    return f"8,192 tokens in one text take {(_memory('VmHWM') - before) / 1024:,.0f} MB beside the weights."


def _memory(name: str) -> int:
    """Kilobytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=list(NAMES))
    for network in parser.parse_args().network or list(NAMES):
        with tempfile.TemporaryDirectory() as folder:
            directory = write(network, Path(folder))
            encoder = load(network, directory)
            print(f"{NAMES[network]}:", memory(encoder), "\n", flush=True)
            if network == "v3":
                print("\n".join(adapters(encoder)), "\n", flush=True)
            print("\n".join(speeds(network, encoder, directory)), "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of long inputs: blocks of the listwise reranker, and one text of 32,768 tokens.

    python -m benchmarks.long_texts [--only reranker|embedder]

Published sizes, random weights, bf16, all cores. Each input is read in a process of its own, so that its peak
is its own: what stands there once the model is loaded, and what is added while it reads. Processor seconds
are those of all cores together.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.decoder_models import NANO, RERANKER, SMALL, write
from services.core.catalog import Catalog
from services.core.modeling.families.listwise import ListwiseRanker, prompt
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, TextEncoder, TokenIds

_WORDS = "bdfgjkmp"
RERANKER_BLOCKS: tuple[tuple[int, ...], ...] = ((200,) * 20, (1000,) * 4, (1000,) * 8, (1000,) * 16)
"""Tokens of the documents of each block."""

EMBEDDER_TEXTS: tuple[tuple[str, int], ...] = ((NANO, 8192), (SMALL, 8192), (SMALL, 32768))
HEADS = (
    "model",
    "tokens",
    "documents",
    "seconds",
    "of processors",
    "documents/s",
    "tokens/s",
    "loaded",
    "added",
    "peak",
)


def _inputs(model: str, network: TextEncoder | ListwiseRanker, sizes: Sequence[int]) -> TokenIds:
    letters = "".join(random.Random(0).choices(_WORDS, k=max(sizes)))
    if isinstance(network, ListwiseRanker):
        (ids,) = network.tokenizer.prompts([prompt("b d", [letters[:size] for size in sizes])])
        return ids
    return network.tokenizer.encode_batch([letters], truncate_to=sizes[0])[0].ids


def read(directory: Path, model: str, sizes: Sequence[int]) -> str:
    """Read one input; returns a line of the table."""
    cpu = torch.device("cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = load_network(Catalog.load().require(model), directory / model, device=cpu, dtype=torch.bfloat16)
    item = EncodeItem(_inputs(model, network, sizes))
    network.forward([EncodeItem(_inputs(model, network, (32,)))])
    ctypes.CDLL(None).malloc_trim(0)  # as the engine does behind a load
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    loaded = _mebibytes("VmRSS")
    start, busy = time.perf_counter(), time.process_time()
    network.forward([item])
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak, tokens = _mebibytes("VmHWM"), len(item.token_ids)
    speeds = f"{len(sizes) / seconds:.2f} | {tokens / seconds:,.0f}"
    return (
        f"| {model} | {tokens:,} | {len(sizes)} | {seconds:.1f} | {busy:.1f} | {speeds} "
        f"| {loaded:,.0f} MiB | {peak - loaded:,.0f} MiB | {peak:,.0f} MiB |"
    )


def _mebibytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def report(inputs: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Print the table of ``inputs``, each a model and the tokens of what it reads at once."""
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for model, sizes in inputs:
            if not (Path(name) / model).exists():
                write(Path(name), model)
            command = [sys.executable, "-m", "benchmarks.long_texts", "--read", name, model, *map(str, sizes)]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("reranker", "embedder"))
    parser.add_argument("--read", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        directory, model, *sizes = chosen.read
        print(read(Path(directory), model, [int(size) for size in sizes]), flush=True)
        return
    blocks = [(RERANKER, sizes) for sizes in RERANKER_BLOCKS]
    texts = [(model, (size,)) for model, size in EMBEDDER_TEXTS]
    report({"reranker": blocks, "embedder": texts}.get(chosen.only, [*blocks, *texts]))


if __name__ == "__main__":
    main()

"""Memory of a process beside its weights, random weights of published width and depth: for docs/sizing.md.

    python -m benchmarks.memory [--network minilm|v2|v3 ...]

Each row comes from a process of its own: what is resident after loading without the weights, and what the
largest batch of short texts and one text of 8,192 tokens take above that while they are computed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch

from benchmarks.encoders import NAMES, items, write
from services.core.catalog import Catalog
from services.core.catalog.weights import locate
from services.core.inference.memory import weight_bytes
from services.core.modeling.device import choose_dtype
from services.core.modeling.registry import load_text_encoder
from services.core.settings import Settings

MIB = 1 << 20
MODELS = {"minilm": "all-MiniLM-L6-v2", **NAMES}
BATCH = [128] * 128  # SF_MAX_BATCH_TOKENS as it comes
LONG = [8192]
CPU = torch.device("cpu")


def kilobytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(network: str, directory: Path, report: multiprocessing.Queue[tuple[float, ...]]) -> None:
    """Load a model and compute, in a process of its own; MiB of base, batch and long text."""
    torch.set_num_threads(1)
    spec = Catalog.load().require(MODELS[network])
    dtype = choose_dtype(CPU)
    encoder = load_text_encoder(spec, directory, device=CPU, dtype=dtype)
    encoder.forward(items([16]))
    loaded = kilobytes("VmRSS") / 1024
    found = [loaded - weight_bytes(directory, dtype) / MIB]
    for lengths in (BATCH, LONG):
        if lengths[0] > spec.context_length:
            continue
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
        before = kilobytes("VmRSS")
        encoder.forward(items(lengths))
        found.append((kilobytes("VmHWM") - before) / 1024)
    report.put(tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=list(MODELS))
    print("| network | beside weights, idle | 128 texts of 128 tokens | one text of 8,192 tokens |")
    print("|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for network in parser.parse_args().network or list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            if network == "minilm":
                directory = locate(Catalog.load().require(MODELS[network]), Settings())
            else:
                directory = write(network, Path(folder))
            report: multiprocessing.Queue[tuple[float, ...]] = context.Queue()
            process = context.Process(target=measure, args=(network, directory, report))
            process.start()
            cells = [f"{found:,.0f} MiB" for found in report.get()]
            process.join()
        print(f"| {MODELS[network]} | {' | '.join([*cells, *['-'] * (3 - len(cells))])} |", flush=True)


if __name__ == "__main__":
    main()

"""Encoders of the larger text models, random weights: tokens/s, what adapters cost, memory of a long text.

    python -m benchmarks.encoders [--network v2|v3] [--device cuda] [--rounds 2] [--layers N]

Beside ours stands the plain way: transformers' own class (for JinaBERT, which it does not have, the same
in torch modules) in bf16, texts in order of length, 32 at a time, padded to the longest, as
sentence-transformers does it. The two take turns, and the least time of each counts. On a CPU both use one
thread, as each worker of the engine does, and processor time is what is counted, which others on the machine
disturb least. The share of the ceiling counts the operations of the network, attention included, against the
bare bf16 products of its shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.padded import Runner, padded_jina_bert, padded_v3
from services.core.catalog import Catalog
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import Random
from tests.text_checkpoints import TASKS, write_jina_bert, write_v3

NAMES = {"v2": "jina-embeddings-v2-base-en", "v3": "jina-embeddings-v3"}
SIZES = {
    "v2": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "v3": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
}
LONGEST = {"v2": 8192, "v3": 8194}
"""Rows of positions; everything but the vocabulary is of the published size."""

CPU_CASES: Mapping[str, Sequence[int]] = {
    "128": (128,) * 16,
    "2,048": (2048,),
    "8..512, mixed": np.geomspace(8, 512, 64).astype(int).tolist(),
}
CUDA_CASES: Mapping[str, Sequence[int]] = {
    "128": (128,) * 2048,
    "512": (512,) * 512,
    "2,048": (2048,) * 128,
    "8,192": (8192,) * 32,
    "8..2,048, mixed": np.geomspace(8, 2048, 1024).astype(int).tolist(),
}
"""Tokens of each text, by name."""

_BATCH = 32
_WORDS = 18
"""Entries of the vocabulary that texts are made of: those that both tokenizers have."""

Run = Callable[[], object]


def write(network: str, directory: Path) -> Path:
    """Write a checkpoint of published width and depth."""
    sizes = SIZES[network] | {"max_position_embeddings": LONGEST[network]}
    writer = write_jina_bert if network == "v2" else write_v3
    return writer(directory, random=Random(gain=1.0), **sizes)


def items(lengths: Sequence[int], tasks: Sequence[str | None] = (None,)) -> list[EncodeItem]:
    """Make random texts of ``lengths`` in no order, their tasks in turn."""
    chance = random.Random(0)
    ids = np.random.default_rng(0)
    return [
        EncodeItem(ids.integers(5, _WORDS, size, dtype=np.int32), tasks[i % len(tasks)])
        for i, size in enumerate(chance.sample(lengths, len(lengths)))
    ]


def in_batches(run: Runner, batch: Sequence[EncodeItem]) -> None:
    """Run ``batch`` as sentence-transformers does: in order of length, 32 at a time."""
    ordered = sorted(batch, key=lambda item: -len(item.token_ids))
    for start in range(0, len(ordered), _BATCH):
        run(ordered[start : start + _BATCH]).cpu()


def turns(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Least seconds of each of ``runs``, which take turns: of this thread on a CPU, else of the clock."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            run()
            least[name] = min(least[name], clock() - began)
    return least


def operations(network: str, batch: Sequence[EncodeItem]) -> float:
    """Multiplications and additions of the network for ``batch``, attention included."""
    width, layers = SIZES[network]["hidden_size"], SIZES[network]["num_hidden_layers"]
    products = sum(out * into for out, into in shapes(network)) * layers
    lengths = [len(item.token_ids) for item in batch]
    return 2.0 * (sum(lengths) * products + 2 * layers * width * sum(n * n for n in lengths))


def shapes(network: str) -> list[tuple[int, int]]:
    """Out and in of the products of one layer."""
    width, inner = SIZES[network]["hidden_size"], SIZES[network]["intermediate_size"]
    up = 2 * inner if network == "v2" else inner
    return [(3 * width, width), (width, width), (up, width), (width, inner)]


def ceiling(network: str, device: torch.device) -> float:
    """Operations per second of the bare bf16 products of one layer."""
    rows = 512 if device.type == "cpu" else 32768
    seconds = work = 0.0
    for out, into in shapes(network):
        x = torch.randn(rows, into, device=device).bfloat16()
        weight = torch.randn(out, into, device=device).bfloat16()
        if device.type == "cpu":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

        def product(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            if x.is_cuda:
                torch.nn.functional.linear(x, weight)
                torch.cuda.synchronize()
            else:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        product()
        seconds += turns({"": product}, device, 10)[""]
        work += 2.0 * rows * out * into
    return work / seconds


def speeds(network: str, encoder: TextEncoder, padded: Runner, device: torch.device, rounds: int) -> None:
    """Print a table of tokens/s by length."""
    limit = ceiling(network, device)
    layers = SIZES[network]["num_hidden_layers"]
    print(f"{NAMES[network]}, {layers} layers; bare bf16 products {limit / 1e12:,.2f} Top/s\n")
    print("| tokens of a text | padded, tokens/s | ours, tokens/s | times | of ceiling |")
    print("|" + " --- |" * 5)
    encoder.forward(items((64, 64)))
    in_batches(padded, items((64, 64)))
    for name, lengths in (CPU_CASES if device.type == "cpu" else CUDA_CASES).items():
        batch = items(lengths)
        runs: dict[str, Run] = {
            "ours": lambda batch=batch: encoder.forward(batch),
            "padded": lambda batch=batch: in_batches(padded, batch),
        }
        found = turns(runs, device, rounds)
        tokens = sum(lengths)
        cells = (
            name,
            f"{tokens / found['padded']:,.0f}",
            f"{tokens / found['ours']:,.0f}",
            f"{found['padded'] / found['ours']:.2f}",
            f"{operations(network, batch) / found['ours'] / limit:.0%}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def adapters(encoder: TextEncoder, device: torch.device, rounds: int) -> None:
    """Print what a task costs against the base, and what a mix of tasks costs against one."""
    lengths = (128,) * (12 if device.type == "cpu" else 2040)
    cases = {"none": (None,), "one task": TASKS[:1], "five tasks and none in one batch": (None, *TASKS)}
    batches = {name: items(lengths, tasks) for name, tasks in cases.items()}
    runs: dict[str, Run] = {
        name: lambda batch=batch: encoder.forward(batch) for name, batch in batches.items()
    }
    for run in runs.values():
        run()
    none, one, mixed = turns(runs, device, 2 * rounds).values()
    tokens = sum(lengths)
    print(f"\n| adapters, {len(lengths)} texts of 128 tokens | tokens/s | against |\n|" + " --- |" * 3)
    print(f"| none | {tokens / none:,.0f} | |")
    print(f"| one task | {tokens / one:,.0f} | {one / none - 1:+.1%} time against none |")
    print(f"| five tasks and none | {tokens / mixed:,.0f} | {mixed / one - 1:+.1%} time against one task |")


def memory(encoder: TextEncoder, device: torch.device) -> float:
    """Megabytes that a text of 8,192 tokens takes at most beside the loaded model."""
    text = items((8192,))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        encoder.forward(text)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would hide what the text takes
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    encoder.forward(text)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Kilobytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=list(NAMES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side takes")
    parser.add_argument("--layers", type=int, help="fewer than published, for a quick look")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    torch.set_num_threads(1)
    for network in chosen.network or list(NAMES):
        SIZES[network]["num_hidden_layers"] = chosen.layers or SIZES[network]["num_hidden_layers"]
        with tempfile.TemporaryDirectory() as folder:
            directory = write(network, Path(folder))
            spec = Catalog.load().require(NAMES[network])
            encoder = load_text_encoder(spec, directory, device=device, dtype=torch.bfloat16)
            took = memory(encoder, device)
            make = padded_jina_bert if network == "v2" else padded_v3
            speeds(network, encoder, make(directory, device), device, chosen.rounds)
            print(f"\nA text of 8,192 tokens takes {took:,.0f} MB beside the weights.", flush=True)
            if network == "v3":
                adapters(encoder, device, chosen.rounds)
            print(flush=True)


if __name__ == "__main__":
    main()

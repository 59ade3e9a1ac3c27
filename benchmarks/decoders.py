"""Tokens per second of the decoders at real size with random weights, and the reranker's time and memory.

    python -m benchmarks.decoders [--repeats 2]

jina-embeddings-v5-text-nano against what sentence-transformers does with it: a stock bf16 model, up to 32
texts at a time in order of length, padded to the longest. Both use one thread, as each worker of the engine
does, and processor time is what is counted, which others on the machine disturb least. The ceiling is what
the products of the network's shapes alone reach. Each block of the reranker runs in a process of its own, so
that its peak is its own, and on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.modeling.decoder import decoder_shapes, linear_sizes
from services.core.modeling.decoder_config import EUROBERT, QWEN3, DecoderConfig, Form
from services.core.modeling.listwise import ListwiseRanker, projector_shapes, prompt
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, TextEncoder

CORES = os.cpu_count() or 1
NANO, RERANKER = "jina-embeddings-v5-text-nano", "jina-reranker-v3"
TASKS = ("retrieval", "text-matching", "clustering", "classification")
CASES: dict[str, tuple[int, ...]] = {
    "64": (64,) * 16,
    "512": (512,) * 4,
    "2,048": (2048,),
    "8..512": tuple(int(n) for n in np.geomspace(8, 512, 12)),
}
BLOCKS = (0, 8000, 16000)
"""Tokens of the reranker's blocks; 0 is one of 20 documents of 200 tokens."""

_COMMON: dict[str, Any] = {"hidden_act": "silu", "intermediate_size": 3072}
CONFIGS: dict[str, tuple[dict[str, Any], Form]] = {
    NANO: (
        _COMMON
        | {
            "model_type": "jina_embeddings_v5",
            "vocab_size": 128256,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 250000.0,
            "max_position_embeddings": 8192,
        },
        EUROBERT,
    ),
    RERANKER: (
        _COMMON
        | {
            "architectures": ["JinaForRanking"],
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
        },
        QWEN3,
    ),
}


def write(directory: Path, model: str) -> Path:
    """Write ``model`` with random weights as a published checkpoint."""
    from tests.decoder_checkpoints import MARKERS, qwen_tokenizer, write_adapter

    raw, form = CONFIGS[model]
    config = DecoderConfig.read(raw, form)
    folder = directory / model
    folder.mkdir(parents=True)
    shapes = decoder_shapes(config) | (projector_shapes(config.width, 512) if model == RERANKER else {})
    save_file({name: _random(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    qwen_tokenizer(*MARKERS).save(str(folder / "tokenizer.json"))
    for task in TASKS if model == NANO else ():
        write_adapter(folder, task, config, rank=32, alpha=32)
    return folder


def _random(name: str, shape: Sequence[int]) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(*shape, dtype=torch.bfloat16)
    scale = 1.0 if name.startswith("embed") else shape[-1] ** -0.5
    return (torch.randn(*shape) * scale).bfloat16()


def spec_of(model: str) -> ModelSpec:
    """Return the catalogue's entry."""
    return Catalog.load().require(model)


def best(run: Callable[[], object], repeats: int) -> float:
    """Least seconds of processor time of ``run``."""
    times: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def items(lengths: Sequence[int], tasks: Sequence[str | None]) -> list[EncodeItem]:
    """Make random texts of ``lengths``, their tasks in turn."""
    chance = np.random.default_rng(0)
    return [
        EncodeItem(chance.integers(0, 128000, n, dtype=np.int32), tasks[i % len(tasks)])
        for i, n in enumerate(lengths)
    ]


def ours(encoder: TextEncoder, tasks: Sequence[str | None], repeats: int) -> list[float]:
    """Seconds of each case."""
    batches = [items(lengths, tasks) for lengths in CASES.values()]
    encoder.forward(batches[0])
    return [best(lambda batch=batch: encoder.forward(batch), repeats) for batch in batches]


def theirs(repeats: int) -> list[float]:
    """Seconds of each case in a stock padded bf16 model without adapters, 32 texts at a time."""
    from transformers import EuroBertConfig, EuroBertModel

    raw = {name: value for name, value in CONFIGS[NANO][0].items() if name != "model_type"}
    model = EuroBertModel(EuroBertConfig(**raw, pad_token_id=0)).bfloat16().eval()

    def run(lengths: Sequence[int]) -> None:
        texts = sorted(items(lengths, (None,)), key=lambda item: -len(item.token_ids))
        longest = len(texts[0].token_ids)
        ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text.token_ids)] = torch.from_numpy(text.token_ids)
            mask[row, : len(text.token_ids)] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden[torch.arange(len(texts)), mask.sum(1) - 1].float().numpy()

    run(CASES["64"])
    return [best(lambda lengths=lengths: run(lengths), repeats) for lengths in CASES.values()]


def ceiling(repeats: int) -> float:
    """Tokens per second of the bare bf16 products for passes of 512 tokens."""
    raw, form = CONFIGS[NANO]
    config = DecoderConfig.read(raw, form)
    seconds = 0.0
    for name, (out, into) in linear_sizes(config).items():
        if name.startswith("layers.0."):
            x = torch.randn(512, into).bfloat16()
            weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, into).bfloat16(), None)
            product = torch.ops.mkldnn._linear_pointwise
            product(x, weight, None, "none", [], "")
            seconds += best(lambda x=x, w=weight, f=product: f(x, w, None, "none", [], ""), 10 * repeats)
    return 512 / (seconds * config.layers)


def embedder(directory: Path, repeats: int) -> None:
    """Print the table of nano."""
    encoder = load_network(
        spec_of(NANO), write(directory, NANO), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert not isinstance(encoder, ListwiseRanker)
    columns = {
        "one task": ours(encoder, TASKS[:1], repeats),  # type: ignore[arg-type]
        "four tasks": ours(encoder, TASKS, repeats),  # type: ignore[arg-type]
        "padded": theirs(repeats),
    }
    limit = ceiling(repeats)
    print(f"bare bf16 products: {limit:,.0f} tokens/s\n")
    print("| tokens | " + " | ".join(columns) + " | four / one | one / padded | one / ceiling |")
    print("|---" * (len(columns) + 4) + "|")
    for i, (name, lengths) in enumerate(CASES.items()):
        one, four, padded = speed = [sum(lengths) / times[i] for times in columns.values()]
        ratios = (four / one, one / padded, one / limit)
        print(f"| {name} | " + " | ".join([f"{n:,.0f}" for n in speed] + [f"{r:.2f}" for r in ratios]) + " |")


def reranker(directory: Path, tokens: int) -> None:
    """Read one block of about so many tokens and print what it took; the process should end then."""
    ranker = load_network(
        spec_of(RERANKER), directory / RERANKER, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert isinstance(ranker, ListwiseRanker)
    words = random.Random(0).choices("abcdefghij", k=2000)
    sizes = [200] * 20 if tokens == 0 else [1000] * (tokens // 1000)
    (ids,) = ranker.tokenizer.prompts([prompt("a b", ["".join(words[:size]) for size in sizes])])
    before = _peak()
    start = time.perf_counter()
    ranker.forward([EncodeItem(ids)])
    seconds = time.perf_counter() - start
    print(
        f"| {len(ids):,} | {len(sizes)} | {seconds:.1f} s | {len(sizes) / seconds:.2f} | "
        f"{len(ids) / seconds:,.0f} | {_peak() - before:,.0f} MB | {_peak():,.0f} MB |",
        flush=True,
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--block", nargs=2, metavar=("DIRECTORY", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("embedder", "reranker"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.block:
        torch.set_num_threads(CORES)
        reranker(Path(arguments.block[0]), int(arguments.block[1]))
        return
    print(
        f"{torch.cpu.get_capabilities()['cpu_name']}, one of {CORES} cores, torch {torch.__version__}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        directory = Path(name)
        if arguments.only != "reranker":
            embedder(directory, arguments.repeats)
        if arguments.only != "embedder":
            write(directory, RERANKER)
            print("\n| tokens of a block | documents | time | documents/s | tokens/s | grown by | peak |")
            print("|---" * 7 + "|", flush=True)
            for tokens in BLOCKS:
                command = [sys.executable, "-m", "benchmarks.decoders", "--block", name, str(tokens)]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

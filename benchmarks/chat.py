"""Answers of jina-vlm's decoder beside transformers: tokens a second for 1, 4 and 16 callers, and of prompts.

    python -m benchmarks.chat [--layers N] [--dtype float32|bfloat16] [--without-transformers]

Published widths and vocabulary, random weights, all cores. Without ``--layers`` as many of the 28 layers as
half of the free memory holds twice, once for each side; the table says how many. transformers steps over a
``StaticCache`` of its own with one forward for each token, greedily, as its ``generate`` does. Rounds of both
sides take turns and each side's fastest counts, so that what else the machine does meets both.
``of bandwidth`` is the share of the time that reading the weights once takes, at the pace at which all
cores read memory here.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from services.core.inference.memory import free_bytes
from services.core.modeling.layers.causal import (
    BLOCK,
    CausalForm,
    CausalLayer,
    CausalWeights,
    Chunk,
    Dense,
)
from services.core.modeling.native.causal import causal_network

_LAYERS, _CALLERS, _CONTEXT, _PROMPT = 28, (1, 4, 16), 128, 256
_ROUNDS, _TOKENS = 3, 4
HEADS = (
    "side",
    "layers",
    "dtype",
    "callers",
    "tokens/s",
    "ms a step",
    "of bandwidth",
    "against transformers",
)


def form(layers: int) -> CausalForm:
    """Make jina-vlm's decoder of so many layers."""
    return CausalForm(
        width=2048, layers=layers, heads=16, key_heads=8, head_dim=128, inner=6144,
        vocabulary=151936, positions=40960, epsilon=1e-6, rotary_base=1e6,
    )  # fmt: skip


def weights(layers: int, dtype: torch.dtype) -> CausalWeights:
    """Make random weights; layers are made as they are read."""
    f = form(layers)
    make = torch.Generator().manual_seed(0)

    def matrix(out: int, into: int) -> torch.Tensor:
        return (torch.randn(out, into, generator=make) * into**-0.5).to(dtype)

    def each() -> Iterator[CausalLayer]:
        for _ in range(layers):
            yield CausalLayer(
                attention_norm=torch.ones(f.width),
                joined=Dense(matrix((f.heads + 2 * f.key_heads) * f.head_dim, f.width)),
                attended=Dense(matrix(f.width, f.heads * f.head_dim)),
                inner_norm=torch.ones(f.width),
                gate=matrix(f.inner, f.width),
                up=matrix(f.inner, f.width),
                down=matrix(f.width, f.inner),
                query_norm=torch.ones(f.head_dim),
                key_norm=torch.ones(f.head_dim),
            )

    return CausalWeights(
        f, matrix(f.vocabulary, f.width), each(), torch.ones(f.width), matrix(f.vocabulary, f.width)
    )


class Ours:
    """The network of the engine."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        self.network = causal_network(weights(layers, dtype), torch.device("cpu"), dtype)
        self.blocks = -(-(_CONTEXT + 64) // BLOCK)
        self.network.open_cache(max(max(_CALLERS) * self.blocks, -(-_PROMPT // BLOCK)))

    def read(self, callers: int) -> None:
        """Fill the cache of each caller with a prompt."""
        for i in range(callers):
            self.network.step([Chunk(_ids(_CONTEXT), 0, self._table(i), asks=False)])

    def answer(self, callers: int, at: int) -> None:
        """Make one token for each caller."""
        chunks = [Chunk(_ids(1), at, self._table(i)) for i in range(callers)]
        self.network.step(chunks).argmax(1)

    def prompt(self) -> None:
        """Read a prompt in the engine's chunks."""
        table = np.arange(-(-_PROMPT // BLOCK), dtype=np.int32)
        for start in range(0, _PROMPT, BLOCK):
            last = start + BLOCK >= _PROMPT
            self.network.step([Chunk(_ids(BLOCK), start, table, asks=last)])

    def _table(self, caller: int) -> np.ndarray:
        return np.arange(caller * self.blocks, (caller + 1) * self.blocks, dtype=np.int32)


class Theirs:
    """transformers' Qwen3, the same widths."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        f = form(layers)
        config = Qwen3Config(
            vocab_size=f.vocabulary, hidden_size=f.width, num_hidden_layers=layers, head_dim=f.head_dim,
            num_attention_heads=f.heads, num_key_value_heads=f.key_heads, intermediate_size=f.inner,
            tie_word_embeddings=False,
        )  # fmt: skip
        torch.set_default_dtype(dtype)
        self.network = Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.config = config

    def read(self, callers: int) -> None:
        """Fill a cache with the prompts of all callers."""
        from transformers import StaticCache

        self.cache = StaticCache(self.config, max_cache_len=_CONTEXT + 64)
        ids = torch.from_numpy(_ids(_CONTEXT)).long().repeat(callers, 1)
        with torch.inference_mode():
            self.network(ids, past_key_values=self.cache, logits_to_keep=1)

    def answer(self, callers: int, at: int) -> None:
        """Make one token for each caller."""
        ids = torch.from_numpy(_ids(1)).long().repeat(callers, 1)
        with torch.inference_mode():
            self.network(
                ids, past_key_values=self.cache, position_ids=torch.full((callers, 1), at)
            ).logits.argmax(-1)

    def prompt(self) -> None:
        """Read a prompt at once."""
        with torch.inference_mode():
            self.network(torch.from_numpy(_ids(_PROMPT)).long()[None], logits_to_keep=1)


def _ids(count: int) -> np.ndarray:
    return (np.arange(count) * 7919 % 150000).astype(np.int32)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bandwidth() -> float:
    """Bytes a second that all cores read."""
    numbers = torch.ones(1 << 28)
    numbers.sum()
    return numbers.nbytes / min(_seconds(lambda: numbers.sum().item() and None) for _ in range(5))


def measure(layers: int, dtype: torch.dtype, *, beside: bool) -> list[tuple[str, ...]]:
    """Measure both sides; returns lines of the table."""
    read = bandwidth()
    sides: dict[str, Ours | Theirs] = {"ours": Ours(layers, dtype)}
    if beside:
        sides["transformers"] = Theirs(layers, dtype)
    gc.collect()
    f = form(layers)
    parameters = f.vocabulary * f.width + layers * f.width * (
        2 * f.heads * f.head_dim + 2 * f.key_heads * f.head_dim + 3 * f.inner
    )
    bound = parameters * dtype.itemsize / read
    lines: list[tuple[str, ...]] = []
    name = str(dtype).removeprefix("torch.")
    for callers in _CALLERS:
        best: dict[str, float] = dict.fromkeys(sides, float("inf"))
        for side in sides.values():
            side.read(callers)
        at = _CONTEXT
        for _ in range(_ROUNDS):
            for key, side in sides.items():
                for step in range(_TOKENS):
                    best[key] = min(best[key], _seconds(partial(side.answer, callers, at + step)))
            at += _TOKENS
        for key, seconds in best.items():
            ratio = f"{best['transformers'] / seconds:.2f}" if beside and key == "ours" else ""
            lines.append(
                (key, str(layers), name, str(callers), f"{callers / seconds:.2f}", f"{seconds * 1e3:.0f}",
                 f"{bound / seconds:.0%}", ratio)
            )  # fmt: skip
    times = {key: min(_seconds(side.prompt) for _ in range(2)) for key, side in sides.items()}
    for key, seconds in times.items():
        ratio = f"{times['transformers'] / seconds:.2f}" if beside and key == "ours" else ""
        lines.append(
            (key, str(layers), name, f"a prompt of {_PROMPT}", f"{_PROMPT / seconds:.1f}", "", "", ratio)
        )
    return lines


def fitting(dtype: torch.dtype) -> int:
    """Return the layers that half of the free memory holds twice."""
    f = form(1)
    layer = f.width * (2 * f.heads * f.head_dim + 2 * f.key_heads * f.head_dim + 3 * f.inner) * dtype.itemsize
    words = 2 * f.vocabulary * f.width * dtype.itemsize
    return max(1, min(_LAYERS, int(((free_bytes(torch.device("cpu")) or 0) / 4 - words) // layer)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    lines = measure(args.layers or fitting(dtype), dtype, beside=not args.without_transformers)
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

"""Decoder embedders of published size, random weights: tokens/s through the engine and in padded batches.

    python -m benchmarks.decoders [--device cuda] [--rounds 3] [--processor-time]

Beside the engine stands what sentence-transformers does: transformers' own class in bf16, texts in order of
length, 32 at a time, padded to the longest, all cores; without tokenising and without the adapters, both of
which the engine's figures include. The two take turns, and the least time of each counts. The ceiling is what
the bare bf16 products of the network's shapes reach on the same device; the share of it counts the operations
of the base network, attention included.

With ``--processor-time`` the padded side and the ceiling have one thread, processor time is what counts, and
figures are those of one core. That is for a machine on which others work too: there threads that wait for one
another at every layer wait for everybody.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decoder_models import CONFIGS, NANO, SMALL, Clock, best, ceiling, operations, write
from services.core.call import Call
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine, finish
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.settings import Settings

CALLS = 4
TASKS = ("retrieval.passage", "text-matching", "clustering", "classification")
CPU_CASES: dict[str, tuple[int, ...]] = {
    "64": (64,) * 32,
    "512": (512,) * 4,
    "2,048": (2048,) * 2,
    "8..512, mixed": tuple(int(n) for n in np.geomspace(8, 512, 192)),
}
CUDA_CASES: dict[str, tuple[int, ...]] = {
    "128": (128,) * 2048,
    "512": (512,) * 512,
    "2,048": (2048,) * 128,
    "8,192": (8192,) * 32,
    "8..2,048, mixed": tuple(int(n) for n in np.geomspace(8, 2048, 1024)),
}
_BATCH = 32

Run = Callable[[Sequence[str]], object]


class Ours:
    """The engine, asked by some calls at once, each with its share of the texts."""

    def __init__(self, engine: Engine, model: str, loop: asyncio.AbstractEventLoop) -> None:
        self._model = engine.embedder(model)
        self._loop = loop

    def run(self, texts: Sequence[str], tasks: Sequence[str] = TASKS[:1]) -> None:
        async def call(i: int) -> None:
            options = EmbedOptions(task=tasks[i % len(tasks)])
            finish((await self._model.embed(texts[i::CALLS], options, Call("benchmark"))).vectors)

        async def calls() -> None:
            await asyncio.gather(*(call(i) for i in range(min(CALLS, len(texts)))))

        self._loop.run_until_complete(calls())


class Padded:
    """The stock model over the same tokens."""

    def __init__(self, directory: Path, model: str, device: torch.device) -> None:
        from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

        raw: dict[str, Any] = {name: v for name, v in CONFIGS[model][0].items() if name != "model_type"}
        make_config, make_model = (
            (EuroBertConfig, EuroBertModel) if model == NANO else (Qwen3Config, Qwen3Model)
        )
        self._network = make_model(make_config(**raw, pad_token_id=0)).bfloat16().to(device).eval()
        self._tokenizer = Tokenizer.load(directory)
        self._device = device

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        return [each.ids for each in self._tokenizer.encode_batch(texts, "Document: ")]

    def run(self, tokens: Sequence[np.ndarray[Any, Any]]) -> None:
        ordered = sorted(tokens, key=lambda ids: -len(ids))
        vectors = [self._batch(ordered[i : i + _BATCH]) for i in range(0, len(ordered), _BATCH)]
        torch.cat(vectors).cpu().numpy()

    def _batch(self, tokens: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
        ids, mask = torch.zeros(2, len(tokens), len(tokens[0]), dtype=torch.long)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.from_numpy(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode():
            hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
            last = hidden[torch.arange(len(tokens), device=self._device), mask.sum(1) - 1].float()
            return torch.nn.functional.normalize(last, dim=1)


def texts_of(lengths: Sequence[int], extra: int) -> list[str]:
    """Texts of so many tokens each, ``extra`` for prompt and specials included, in no order."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("bdfgjkmp", k=max(1, n - extra))) for n in lengths]
    chance.shuffle(texts)
    return texts


def report(model: str, device: torch.device, rounds: int, clock: Clock) -> None:
    """Print the table of one model."""
    cases = CPU_CASES if device.type == "cpu" else CUDA_CASES
    limit = ceiling(model, device, clock)
    print(f"{model}; bare bf16 products {limit / 1e12:,.2f} Top/s\n", flush=True)
    heads = (
        "tokens",
        "padded, tok/s",
        "engine, tok/s",
        "times",
        "of ceiling",
        "four tasks, tok/s",
        "against one",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        directory = write(Path(name), model)
        loop = runner.get_loop()
        settings = Settings(models=(model,), model_dir=Path(name), device=str(device), dtype="bfloat16")
        engine = loop.run_until_complete(Engine.start(settings, Catalog.load()))
        ours, padded = Ours(engine, model, loop), Padded(directory, model, device)
        extra = len(padded.tokens([""])[0])
        for case, lengths in cases.items():
            print(_row(case, model, ours, padded, texts_of(lengths, extra), limit, rounds, clock), flush=True)
        loop.run_until_complete(engine.stop(1.0))


def _row(
    case: str,
    model: str,
    ours: Ours,
    padded: Padded,
    texts: list[str],
    limit: float,
    rounds: int,
    clock: Clock,
) -> str:
    tokens = padded.tokens(texts)
    lengths = [len(ids) for ids in tokens]
    variants: dict[str, Callable[[], object]] = {
        "one": lambda: ours.run(texts),
        "padded": lambda: padded.run(tokens),
        "four": lambda: ours.run(texts, TASKS),
    }
    ours.run(texts[:8], TASKS)
    padded.run(tokens[:2])
    seconds = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for variant, run in variants.items():
            seconds[variant] = min(seconds[variant], best(run, 1, clock))
    one, plain, four = (sum(lengths) / seconds[variant] for variant in variants)
    share = operations(model, lengths) / seconds["one"] / limit
    cells = (case, f"{plain:,.0f}", f"{one:,.0f}", f"{one / plain:.2f}", f"{share:.0%}", f"{four:,.0f}")
    return f"| {' | '.join(cells)} | {one / four - 1:+.0%} time |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--processor-time", action="store_true", help="of one core instead of wall time")
    chosen = parser.parse_args()
    clock = time.process_time if chosen.processor_time else time.perf_counter
    device = torch.device(chosen.device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cores = len(os.sched_getaffinity(0))
        name = f"{torch.cpu.get_capabilities()['cpu_name']}, {'one of ' * chosen.processor_time}{cores} cores"
        torch.set_num_threads(1 if chosen.processor_time else cores)
    print(f"{name}, torch {torch.__version__}", flush=True)
    for model in (NANO,) if device.type == "cpu" else (NANO, SMALL):
        report(model, device, chosen.rounds, clock)


if __name__ == "__main__":
    main()

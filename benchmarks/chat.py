"""Answers of jina-vlm's decoder beside transformers: tokens a second for 1, 4 and 16 callers, and of prompts.

    python -m benchmarks.chat [--layers N] [--dtype float32|bfloat16] [--without-transformers]

Published widths and vocabulary, random weights in bf16 as published, all cores. Both sides compute in
``--dtype``, the service's default on this processor; ours keeps the weights in bf16 whatever it computes in.
Without ``--layers`` as many of the 28 layers as the free memory holds for both; the table says how many.
Ours are conversations through the
engine, as a service runs them; theirs is ``generate``, greedy, all callers in one batch, over a
``DynamicCache`` that has read the prompt. Rounds of both sides take turns and each side's fastest counts, so
that what else the machine does meets both. ``of bandwidth`` is the share of a step's time that reading the
that side's weights once takes, at the pace at which all cores read memory here.

Below: how long a short conversation waits for its first token, alone and while another one's prompt of 4,000
tokens is read, and what embedding calls of the same process, and of another one, notice of 16 answers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Usage
from services.core.inference import EmbeddingModel, EmbedOptions, Engine
from services.core.inference.answering import AnswerOptions, ChatModel, Turn
from services.core.inference.loading import load_model
from services.core.inference.memory import free_bytes
from services.core.modeling.device import choose_dtype
from services.core.modeling.layers.causal import BLOCK, CausalForm, CausalLayer, CausalWeights, Dense
from services.core.modeling.native.causal import causal_network
from services.core.modeling.types import Feature, Message, PreparedChat
from services.core.settings import Settings

MODEL, BESIDE = "jina-vlm", "all-MiniLM-L6-v2"
LAYERS, CALLERS = 28, (1, 4, 16)
CONTEXT, PROMPT, LONG_PROMPT, SHORT_PROMPT = 2 * BLOCK, 256, 4000, 16
ROUNDS, TOKENS = 2, 6
EMBEDDINGS, PAUSE = 200, 0.01
_SENTENCE = "The river runs past the old stone bridge and the market into the sea."
_LONG_ANSWER = 300
_UNDER_WAY = 2.0
"""Seconds after which what is measured beside others has begun, and all of them are at work."""

HEADS = ("side", "layers", "dtype", "callers", "tokens/s", "ms a step", "of bandwidth", "times transformers")
_LEFT_FREE = 2 << 30
"""Of memory, for caches, both sides' scratch and everybody else."""
_BEGAN = time.perf_counter()


def form(layers: int) -> CausalForm:
    """Make jina-vlm's decoder of so many layers."""
    return CausalForm(
        width=2048, layers=layers, heads=16, key_heads=8, head_dim=128, inner=6144,
        vocabulary=151936, positions=40960, epsilon=1e-6, rotary_base=1e6,
    )  # fmt: skip


def layer_numbers(f: CausalForm) -> int:
    """Return how many weights a layer has."""
    return f.width * (2 * f.heads * f.head_dim + 2 * f.key_heads * f.head_dim + 3 * f.inner)


class Weights:
    """Random numbers for both sides: matrices are windows of one table, which each side copies.

    Numbers that repeat take as long as others; memory that is read twice would not.
    """

    def __init__(self, layers: int) -> None:
        self.form = form(layers)
        f = self.form
        random = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 22, np.float32))
        # To draw as many as there are weights takes longer than all that is measured here.
        self.table = torch.empty(f.vocabulary * f.width, dtype=torch.bfloat16)
        for start in range(0, len(self.table), len(random)):
            part = self.table[start : start + len(random)]
            part.copy_(random[: len(part)] * f.width**-0.5)

    def matrix(self, out: int, into: int) -> torch.Tensor:
        """Return a window of the table."""
        return self.table[: out * into].view(out, into)

    def causal(self) -> CausalWeights:
        """Return what the engine's network is made of."""
        f = self.form

        def each() -> Iterator[CausalLayer]:
            for _ in range(f.layers):
                yield CausalLayer(
                    attention_norm=torch.ones(f.width),
                    joined=Dense(self.matrix((f.heads + 2 * f.key_heads) * f.head_dim, f.width)),
                    attended=Dense(self.matrix(f.width, f.heads * f.head_dim)),
                    inner_norm=torch.ones(f.width),
                    gate=self.matrix(f.inner, f.width),
                    up=self.matrix(f.inner, f.width),
                    down=self.matrix(f.width, f.inner),
                    query_norm=torch.ones(f.head_dim),
                    key_norm=torch.ones(f.head_dim),
                )

        words = self.matrix(f.vocabulary, f.width)
        return CausalWeights(f, words, each(), torch.ones(f.width), words)

    @property
    def numbers(self) -> int:
        """How many of the weights a step reads."""
        return self.form.vocabulary * self.form.width + self.form.layers * layer_numbers(self.form)


class Prompts:
    """Stands in for a processor: a text is the number of a prompt and how many tokens it has."""

    fit = None
    ends = frozenset({151645})

    def __init__(self, vocabulary: int) -> None:
        self.pieces = [b"%d " % id for id in range(vocabulary)]

    def expected(self, kind: Modality) -> int:
        """There are no pictures here."""
        raise NotImplementedError(kind)

    def tokenize(self, text: str) -> list[int]:
        """Grammars are not measured."""
        raise NotImplementedError(text)

    def prepare(self, messages: Sequence[Message]) -> PreparedChat:
        """Make the ids of ``"number tokens"``; the same number begins alike."""
        (text,) = messages[-1].parts
        assert isinstance(text, str)
        number, tokens = map(int, text.split())
        ids = np.random.default_rng(number).integers(0, 150000, tokens).astype(np.int32)
        return PreparedChat(ids, (), Usage(text=tokens))


class Decoder:
    """jina-vlm without a tower; see ``types.Generator``."""

    width = batch_tokens = 0

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        network = causal_network(weights.causal(), torch.device("cpu"), dtype)
        self.processor = Prompts(weights.form.vocabulary)
        self.block_bytes = network.block_bytes
        self.open_cache = network.open_cache
        self.step = network.step

    def looks(self, feature: Feature) -> int:
        """There are no pictures here."""
        raise NotImplementedError(feature)

    def look(self, feature: Feature, part: int) -> torch.Tensor:
        """As ``looks``."""
        raise NotImplementedError(feature, part)

    def seen(self, feature: Feature, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """As ``looks``."""
        raise NotImplementedError(feature, parts)

    def warm_up(self) -> None:
        """The first round is one."""


class Theirs:
    """transformers' Qwen3 of the same widths."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        f = weights.form
        config = Qwen3Config(
            vocab_size=f.vocabulary, hidden_size=f.width, num_hidden_layers=f.layers, head_dim=f.head_dim,
            num_attention_heads=f.heads, num_key_value_heads=f.key_heads, intermediate_size=f.inner,
            max_position_embeddings=f.positions, rms_norm_eps=f.epsilon, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.device("meta"):
            self.network = Qwen3ForCausalLM(config).to(dtype).eval()
        words = weights.matrix(f.vocabulary, f.width).to(dtype)
        state = {
            name: words if len(each) == f.vocabulary
            else torch.ones(each.shape, dtype=dtype) if each.ndim == 1
            else weights.matrix(*each.shape).to(dtype, copy=True)
            for name, each in self.network.state_dict().items()
        }  # fmt: skip
        self.network.load_state_dict(state, assign=True)
        self.network.model.rotary_emb = Qwen3RotaryEmbedding(config)
        self.config = config

    def seconds(self, callers: int, context: int, tokens: int) -> float:
        """Have ``generate`` answer; the cache holds all of the prompt but its last token."""
        from transformers import DynamicCache

        f = form(self.config.num_hidden_layers)
        cache = DynamicCache(config=self.config)
        dtype = self.network.dtype
        if context > 1:
            for layer in range(f.layers):
                read = torch.zeros(callers, f.key_heads, context - 1, f.head_dim, dtype=dtype)
                cache.update(read, read, layer)
        return self._generate(torch.randint(0, 150000, (callers, context)), tokens, past_key_values=cache)

    def prompt_seconds(self, tokens: int) -> float:
        """Have ``generate`` read a prompt and say one token."""
        return self._generate(torch.randint(0, 150000, (1, tokens)), 1)

    def _generate(self, ids: torch.Tensor, tokens: int, **more: Any) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            said = self.network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **more
            )
        assert said.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - began


class Ours:
    """Conversations through the engine."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.chat(MODEL)
        self._numbers = count(1)

    async def seconds(self, callers: int, context: int, tokens: int) -> float:
        """Answer all callers, and return what it takes from everybody's first token to the last."""
        times = await asyncio.gather(*(_arrivals(self.model, 0, context, tokens + 1) for _ in range(callers)))
        return max(each[-1] for each in times) - max(each[0] for each in times)

    async def prompt_seconds(self, tokens: int) -> float:
        """Read a prompt that nobody has sent before and say one token."""
        began = time.perf_counter()
        (said,) = await _arrivals(self.model, next(self._numbers), tokens, 1)
        return said - began


async def _arrivals(model: ChatModel, number: int, context: int, tokens: int) -> list[float]:
    """When each token of an answer came."""
    async with model.answer(
        [Turn("user", (f"{number} {context}",))], AnswerOptions(most=tokens), Call("benchmark")
    ) as answer:
        times = [time.perf_counter() async for piece in answer for _ in piece.tokens]
    assert len(times) == tokens
    return times


@asynccontextmanager
async def engine_of(weights: Weights, dtype: torch.dtype) -> AsyncIterator[Engine]:
    """Start an engine with the decoder and a model of embeddings."""

    def load(spec: ModelSpec, settings: Settings, device: torch.device) -> Any:
        return Decoder(weights, dtype) if spec.id == MODEL else load_model(spec, settings, device)

    f = weights.form
    tokens = LONG_PROMPT + max(CALLERS) * (CONTEXT + _LONG_ANSWER + BLOCK)
    cache = tokens * 2 * f.layers * f.key_heads * f.head_dim * 4
    settings = Settings(
        models=(MODEL, BESIDE), device="cpu", dtype=str(dtype).removeprefix("torch."), chat_cache_bytes=cache
    )
    engine = await Engine.start(settings, Catalog.load(), load=load, weight_bytes=lambda *_: 0)
    try:
        yield engine
    finally:
        await engine.stop(60.0)


def bandwidth(numbers: torch.Tensor) -> float:
    """Bytes a second at which all cores read ``numbers``, of which no cache holds a part worth naming."""
    words = numbers.view(torch.int32)
    seconds: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        words.max().item()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


class Line(NamedTuple):
    """A row of the first table; ``steps`` is how often all weights are read, None where it is not told."""

    side: str
    callers: str
    tokens: int
    seconds: float
    steps: int | None = None


async def speeds(ours: Ours, theirs: Theirs | None) -> list[Line]:
    """Measure answers and prompts on both sides."""
    lines: list[Line] = []
    await ours.prompt_seconds(SHORT_PROMPT)
    await _arrivals(ours.model, 0, CONTEXT, 1)
    for callers in CALLERS:
        best = {"ours": float("inf")} | ({} if theirs is None else {"transformers": float("inf")})
        for _ in range(ROUNDS):
            best["ours"] = min(best["ours"], await ours.seconds(callers, CONTEXT, TOKENS))
            if theirs is not None:
                seconds = await asyncio.to_thread(theirs.seconds, callers, CONTEXT, TOKENS)
                best["transformers"] = min(best["transformers"], seconds)
        lines += [Line(side, str(callers), callers * TOKENS, each, TOKENS) for side, each in best.items()]
        _progress(f"{callers} callers")
    lines.append(Line("ours", f"a prompt of {PROMPT}", PROMPT, await ours.prompt_seconds(PROMPT)))
    if theirs is not None:
        seconds = await asyncio.to_thread(theirs.prompt_seconds, PROMPT)
        lines.append(Line("transformers", f"a prompt of {PROMPT}", PROMPT, seconds))
    _progress("prompts")
    return lines


Latency = tuple[float, float]
"""Seconds alone, and beside others."""


async def first_tokens(ours: Ours) -> Latency:
    """Seconds until a short conversation's first token: alone, and while a long prompt is read."""
    alone = await ours.prompt_seconds(SHORT_PROMPT)
    async with _busy([ours.prompt_seconds(LONG_PROMPT)]):
        beside = await ours.prompt_seconds(SHORT_PROMPT)
    _progress("first tokens")
    return alone, beside


async def embedding_latencies(ours: Ours, model: EmbeddingModel) -> tuple[Latency, Latency]:
    """95th percentiles of embedding calls of one text beside 16 answers: in this process, and in another."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:

        async def elsewhere() -> float:
            return await asyncio.get_running_loop().run_in_executor(other, _embeddings_of_own)

        alone = await _embeddings(model), await elsewhere()
        async with _busy([ours.seconds(1, CONTEXT, _LONG_ANSWER) for _ in range(max(CALLERS))]):
            beside = await _embeddings(model), await elsewhere()
    _progress("embeddings")
    return (alone[0], beside[0]), (alone[1], beside[1])


def _embeddings_of_own() -> float:
    """Measure in a process that has nothing else to do."""

    async def measured() -> float:
        engine = await Engine.start(Settings(models=(BESIDE,), device="cpu"), Catalog.load())
        try:
            return await _embeddings(engine.embedder(BESIDE))
        finally:
            await engine.stop(5.0)

    return asyncio.run(measured())


async def _embeddings(model: EmbeddingModel) -> float:
    latencies: list[float] = []
    for _ in range(EMBEDDINGS):
        began = time.perf_counter()
        await model.embed([_SENTENCE], EmbedOptions(), Call("benchmark"))
        latencies.append(time.perf_counter() - began)
        await asyncio.sleep(PAUSE)
    return sorted(latencies)[int(0.95 * EMBEDDINGS)]


@asynccontextmanager
async def _busy(work: Sequence[Coroutine[Any, Any, float]]) -> AsyncIterator[None]:
    """Have ``work`` under way meanwhile; RuntimeError if some of it is over before."""
    tasks = [asyncio.ensure_future(each) for each in work]
    await asyncio.sleep(_UNDER_WAY)
    try:
        yield
        if over := [task for task in tasks if task.done()]:
            raise RuntimeError(f"over too soon to be measured beside: {over[0]}")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(layers: int, dtype: torch.dtype, *, beside: bool) -> str:
    """Measure everything; returns tables in Markdown."""
    weights = Weights(layers)
    paces = {
        side: weights.numbers * size / bandwidth(weights.table)
        for side, size in (("ours", torch.bfloat16.itemsize), ("transformers", dtype.itemsize))
    }
    theirs = Theirs(weights, dtype) if beside else None
    async with engine_of(weights, dtype) as engine:
        _progress("weights made")
        ours = Ours(engine)
        lines = await speeds(ours, theirs)
        theirs = None
        gc.collect()
        first = await first_tokens(ours)
        inside, elsewhere = await embedding_latencies(ours, engine.embedder(BESIDE))
    name = str(dtype).removeprefix("torch.")
    texts = [f"| {' | '.join(HEADS)} |", "|" + " --- |" * len(HEADS)]
    rivals = {line.callers: line.seconds for line in lines if line.side != "ours"}
    for line in lines:
        step = line.seconds / line.steps if line.steps else None
        ratio = rivals[line.callers] / line.seconds if rivals and line.side == "ours" else None
        cells = (
            *(line.side, f"{layers} of {LAYERS}", name, line.callers, f"{line.tokens / line.seconds:.2f}"),
            *(("", "") if step is None else (f"{step * 1e3:.0f}", f"{paces[line.side] / step:.0%}")),
            "" if ratio is None else f"{ratio:.2f}",
        )
        texts.append(f"| {' | '.join(cells)} |")
    texts += ["", "| who waits | alone ms | beside ms | times |", "| --- | --- | --- | --- |"]
    for who, (before, after) in (
        (f"first token of {SHORT_PROMPT}, beside a prompt of {LONG_PROMPT}", first),
        (f"embedding calls of {BESIDE} (p95), beside {max(CALLERS)} answers", inside),
        ("the same calls of another process (p95)", elsewhere),
    ):
        texts.append(f"| {who} | {before * 1e3:.1f} | {after * 1e3:.1f} | {after / before:.2f} |")
    return "\n".join(texts)


def fitting(dtype: torch.dtype, *, beside: bool) -> int:
    """Return how many layers the free memory holds, for one side or both."""
    f, narrow, wide = form(1), torch.bfloat16.itemsize, dtype.itemsize if beside else 0
    words = f.vocabulary * f.width * (2 * narrow + wide)
    left = (free_bytes(torch.device("cpu")) or 0) - words - _LEFT_FREE
    return max(1, min(LAYERS, left // (layer_numbers(f) * (narrow + wide))))


def _progress(what: str) -> None:
    print(f"{time.perf_counter() - _BEGAN:6.1f} s  {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    dtype = choose_dtype(torch.device("cpu"), args.dtype)
    beside = not args.without_transformers
    layers = args.layers or fitting(dtype, beside=beside)
    print(asyncio.run(measure(layers, dtype, beside=beside)))


if __name__ == "__main__":
    main()

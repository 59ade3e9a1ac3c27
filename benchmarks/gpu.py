"""How far a CUDA device is used: ``python -m benchmarks.gpu``, in less than eight minutes, without a network.

All models have published sizes and random weights, written to a folder of its own and used with their tasks.
``forward`` is a network's own pass in one thread, ``engine`` what calls get that are all in flight together,
``padded`` transformers' class (of v2 plain torch modules), in bf16 with sdpa, without adapters, in batches of
32 and 256 texts sorted by length. Rates count the tokens of texts, never padding. A share is of the rate that
the bare products of the network's own shapes reach, one after the other. Nothing is tokenised but the texts
of the reranker. ``--tiny`` rehearses all of it on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from benchmarks import decoder_models
from benchmarks.padded import padded_jina_bert
from search_foundation.commands.serve import settle_garbage_collector
from services.core.call import Call
from services.core.catalog import Catalog
from services.core.inference.embedding import EmbedOptions, finish
from services.core.inference.engine import Engine
from services.core.inference.scoring import ScoreOptions
from services.core.modeling.families import bert, jina_bert, xlm_rotary
from services.core.modeling.families.decoder import decoder_shapes
from services.core.modeling.families.decoder_config import DecoderConfig
from services.core.modeling.families.listwise import ListwiseRanker, projector_shapes
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.layers.lora import Adapters
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, Tokens
from services.core.settings import Settings
from tests import text_checkpoints
from tests.checkpoints import bert_config, word_pieces
from tests.decoder_checkpoints import MARKERS, V5_TASKS, qwen_tokenizer, write_adapter

MIXED = "8..512"
LENGTHS: dict[str, list[int]] = {
    "16": [16] * 8192,
    "128": [128] * 2048,
    MIXED: [int(n) for n in np.geomspace(8, 512, 1024)],
    "512": [512] * 512,
    "2048": [2048] * 96,
    "8192": [8192] * 24,
}
TINY_LENGTHS: dict[str, list[int]] = {"16": [16] * 32, MIXED: [8, 12, 18, 27, 40]}

NAMES = {
    "minilm": "all-MiniLM-L6-v2",
    "v3": "jina-embeddings-v3",
    "nano": decoder_models.NANO,
    "small": decoder_models.SMALL,
    "v2": "jina-embeddings-v2-base-en",
    "reranker": decoder_models.RERANKER,
}
TASKS = {"v3": "text-matching", "nano": "retrieval.passage", "small": "retrieval.passage"}
LONGEST = {"minilm": 512, "reranker": 131072}
_TINY = {"num_hidden_layers": 2, "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128}


@dataclass(slots=True)
class Bench:
    """What all parts share. ``until`` is when the last one has to begin."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    seconds: float
    until: float
    rates: dict[str, float] = field(default_factory=dict[str, float])

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, work: Callable[[], object], repeats: int = 10) -> float:
        """Milliseconds of one of so many runs behind one another on the device."""
        for _ in range(3):
            work()
        self.sync()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.sync()
        return 1e3 * (time.perf_counter() - started) / repeats

    def late(self) -> bool:
        return time.perf_counter() > self.until


def say(*words: object) -> None:
    print(*words, flush=True)


# -- checkpoints ------------------------------------------------------------------------------------------


def write(bench: Bench, kind: str) -> Path:
    """Write a checkpoint of published size with random weights."""
    folder = bench.folder / NAMES[kind]
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    config, shapes, tokenizer = _form(kind, bench.tiny)
    generator = torch.Generator(bench.device).manual_seed(0)

    def numbers(name: str, shape: Sequence[int]) -> torch.Tensor:
        last = name.rsplit(".", 1)[-1]
        if len(shape) == 1 and last != "bias":
            return torch.ones(*shape, dtype=bench.dtype)
        scale = (
            0.05
            if "lora_" in name
            else 0.02
            if last == "bias"
            else 0.3
            if "embed" in name
            else shape[-1] ** -0.5
        )
        drawn = torch.empty(*shape, dtype=bench.dtype, device=bench.device)
        return drawn.normal_(0, scale, generator=generator).cpu()

    save_file({name: numbers(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    if kind in ("nano", "small"):
        form = decoder_models.CONFIGS[NAMES[kind]][1]
        for task in V5_TASKS:
            write_adapter(folder, task, DecoderConfig.read(config, form), rank=32, alpha=32)
    return folder


def _form(kind: str, tiny: bool) -> tuple[dict[str, Any], Mapping[str, Sequence[int]], Any]:
    change: dict[str, Any] = {}
    if kind == "minilm":
        size = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
        change = (
            _TINY | {"num_attention_heads": 4}
            if tiny
            else size | {"num_hidden_layers": 6, "vocab_size": 30522}
        )
        config = bert_config(**change | {"max_position_embeddings": 512})
        return config, bert.shapes(bert.read_config(config)), word_pieces()
    if kind == "v2":
        size = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
        }
        change = _TINY | {"num_attention_heads": 4} if tiny else size | {"vocab_size": 30528}
        config = text_checkpoints.jina_bert_config(**change | {"max_position_embeddings": 8192})
        parsed = jina_bert.read_config(config)
        shapes = dict(jina_bert._embedding_shapes(parsed))
        for i in range(parsed.layers):
            shapes |= jina_bert._standard_shapes(parsed, f"encoder.layer.{i}")
        return config, shapes, text_checkpoints.byte_pairs()
    if kind == "v3":
        size = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
        }
        change = _TINY | {"num_attention_heads": 4} if tiny else size | {"vocab_size": 250002}
        config = text_checkpoints.v3_config(**change | {"max_position_embeddings": 8194})
        shapes = xlm_rotary.xlm_rotary_shapes(xlm_rotary.read_config(config), Adapters.read(config))
        return config, shapes, text_checkpoints.sentence_pieces()
    config, form = decoder_models.CONFIGS[NAMES[kind]]
    if tiny:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if kind == "nano" else 2, "head_dim": 16}
        config = config | _TINY | heads
    parsed = DecoderConfig.read(config, form)
    shapes = decoder_shapes(parsed) | (projector_shapes(parsed.width, 512) if kind == "reranker" else {})
    return config, shapes, qwen_tokenizer(*MARKERS, ends=kind == "nano")


# -- the product ------------------------------------------------------------------------------------------


class Known:
    """A tokenizer for which texts are known: ``"<tokens> <seed>"`` has so many ids, always the same."""

    special_length, prefix_length = 2, 1

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self._seen = vocabulary, dict[str, Tokens]()

    def names(self, ids: Sequence[int]) -> list[str]:
        return [str(id) for id in ids]

    def encode_batch(
        self, texts: Sequence[str], prompt: str = "", truncate_to: int | None = None
    ) -> list[Tokens]:
        return [self._seen.get(text) or self._make(text) for text in texts]

    def _make(self, text: str) -> Tokens:
        length, seed = map(int, text.split())
        ids = np.random.default_rng(seed).integers(1, self.vocabulary, length, dtype=np.int32)
        self._seen[text] = Tokens(ids, length, False)
        return self._seen[text]


class Model:
    """One model in an engine of its own."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench, self.kind = bench, kind
        self.folder = write(bench, kind)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.loop = asyncio.new_event_loop()
        catalog = Catalog.load()
        spec = catalog.require(NAMES[kind])
        if bench.tiny and kind != "reranker":
            object.__setattr__(spec, "dimensions", self.config["hidden_size"])
        self.task = TASKS.get(kind)
        self.adapter = spec.adapter(self.task) if self.task else None
        self.adapters = sorted(set(spec.adapters.values()))
        self.tasks = sorted(spec.adapters)
        self.tokenizer = Known(self.config["vocab_size"])
        self.network: Any = None
        settings = Settings(
            models=(NAMES[kind],),
            model_dir=bench.folder,
            data_dir=bench.folder / "data",
            device=bench.device.type,
            dtype="float32" if bench.tiny else "bfloat16",
            max_queue_tokens=32_000_000,
        )
        started = time.perf_counter()
        self.engine = self.loop.run_until_complete(Engine.start(settings, catalog, load=self._load))
        self.start_seconds = time.perf_counter() - started
        # As a server does. Else a look at all that was imported stops the first load for some 0.3 s.
        settle_garbage_collector()

    def _load(self, spec: Any, settings: Any, device: torch.device) -> Any:
        network: Any = load_network(spec, self.folder, device=device, dtype=self.bench.dtype)
        network.warm_up()
        if not isinstance(network, ListwiseRanker):
            network.processor = TextProcessor(spec, self.tokenizer)
        self.network = network
        return network

    def texts(self, lengths: Sequence[int]) -> list[str]:
        texts = [f"{n} {i % 64}" for i, n in enumerate(lengths)]
        random.Random(7).shuffle(texts)
        return texts

    def items(self, lengths: Sequence[int], adapters: Sequence[str | None] | None = None) -> list[EncodeItem]:
        given = (self.adapter,) if adapters is None else adapters
        tokens = self.tokenizer.encode_batch(self.texts(lengths))
        return [EncodeItem(each.ids, given[i % len(given)]) for i, each in enumerate(tokens)]

    def passes(self, items: Sequence[EncodeItem], budget: int) -> list[list[EncodeItem]]:
        batches: list[list[EncodeItem]] = []
        room = 0
        for item in items:
            if not batches or len(item.token_ids) > room:
                batches.append([])
                room = budget
            batches[-1].append(item)
            room -= len(item.token_ids)
        return batches

    @property
    def budget(self) -> int:
        """Tokens of a pass as the engine makes them."""
        if self.bench.tiny:
            return 128
        return getattr(self.network, "batch_tokens", None) or 16384

    def forward(self, items: Sequence[EncodeItem], budget: int | None = None) -> float:
        """Tokens a second of the network's own passes, in this thread."""
        batches = self.passes(items, budget or self.budget)
        self.network.forward(batches[0])
        return _rate(
            batches, self.network.forward, lambda b: sum(len(i.token_ids) for i in b), self.bench.seconds
        )

    def under_load(
        self, lengths: Sequence[int], per_call: int, calls: int, tasks: Sequence[str] = ()
    ) -> Load:
        """Keep ``calls`` calls of ``per_call`` texts in flight, of the model's task or of all ``tasks``."""
        texts = self.texts(lengths)
        starts = list(range(0, len(texts) - per_call + 1, per_call)) or [0]
        sizes = [sum(int(text.split()[0]) for text in texts[i : i + per_call]) for i in starts]
        turns = iter(range(1 << 62))
        model = self.engine.embedder(NAMES[self.kind])
        options = [EmbedOptions(task=task) for task in tasks or (self.task,)]
        latencies: list[float] = []
        tokens = answered = 0

        async def client(until: float) -> None:
            nonlocal tokens, answered
            while (began := time.perf_counter()) < until:
                call = next(turns)
                turn = call % len(starts)
                part = texts[starts[turn] : starts[turn] + per_call]
                found = await model.embed(part, options[call % len(options)], Call("bench"))
                finish(found.vectors)
                if found.usage.total != sizes[turn]:
                    raise RuntimeError(f"{found.usage.total} tokens were read, not {sizes[turn]}")
                latencies.append(time.perf_counter() - began)
                tokens, answered = tokens + sizes[turn], answered + len(part)

        async def crowd(until: float) -> None:
            await asyncio.gather(*(client(until) for _ in range(calls)))

        self.loop.run_until_complete(crowd(time.perf_counter() + self.bench.seconds))
        latencies.clear()
        tokens = answered = 0
        started = time.perf_counter()
        self.loop.run_until_complete(crowd(started + self.bench.seconds))
        took = time.perf_counter() - started
        return Load(tokens / took, answered / took, sorted(latencies))

    def operations(self, lengths: Sequence[int]) -> float:
        """Of the base network's products and of attention, half of that where it is causal."""
        c = self.config
        width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        head_dim = c.get("head_dim") or width // heads
        keys = c.get("num_key_value_heads") or heads
        weights = sum(
            out * into for out, into in shapes_of(self.kind, width, inner, heads * head_dim, keys * head_dim)
        )
        seen = sum(n * n for n in lengths) * (0.5 if self.kind in ("small", "reranker") else 1.0)
        return 2.0 * c["num_hidden_layers"] * (weights * sum(lengths) + 2 * heads * head_dim * seen)

    def stop(self) -> None:
        self.loop.run_until_complete(self.engine.stop(1.0))
        self.loop.close()
        self.network = None
        gc.unfreeze()
        gc.collect()


@dataclass(frozen=True, slots=True)
class Load:
    tokens: float
    texts: float
    latencies: list[float]

    def ms(self, share: float) -> float:
        return 1e3 * self.latencies[min(int(len(self.latencies) * share), len(self.latencies) - 1)]


def shapes_of(kind: str, width: int, inner: int, queries: int, keys: int) -> list[tuple[int, int]]:
    """(out, in) of the products of a layer."""
    ups = 1 if kind in ("minilm", "v3") else 2
    return [(queries + 2 * keys, width), (width, queries), (ups * inner, width), (width, inner)]


def _rate(
    parts: Sequence[Any], run: Callable[[Any], Any], tokens: Callable[[Any], int], seconds: float
) -> float:
    done, i, started = 0, 0, time.perf_counter()
    while True:
        part = parts[i % len(parts)]
        i += 1
        run(part)
        done += tokens(part)
        took = time.perf_counter() - started
        if took > seconds and (i >= len(parts) or took > 3 * seconds):
            return done / took


# -- beside it --------------------------------------------------------------------------------------------


def padded(
    bench: Bench, kind: str, config: Mapping[str, Any], folder: Path
) -> Callable[[Sequence[EncodeItem]], Any]:
    """What runs a batch padded to its longest text."""
    if kind == "v2":
        run = padded_jina_bert(folder, bench.device)
        return lambda items: run(items).cpu()
    import transformers

    make = {
        "minilm": (transformers.BertModel, transformers.BertConfig),
        "v3": (
            getattr(transformers, "JinaEmbeddingsV3Model", None),
            getattr(transformers, "JinaEmbeddingsV3Config", None),
        ),
        "nano": (transformers.EuroBertModel, transformers.EuroBertConfig),
        "small": (transformers.Qwen3Model, transformers.Qwen3Config),
    }[kind]
    known = make[1]().to_dict().keys()
    left_out = {"architectures", "model_type", "auto_map", "_name_or_path", "transformers_version"}
    fields = {name: value for name, value in config.items() if name in known and name not in left_out}
    if kind in ("nano", "small"):
        fields["pad_token_id"] = 0
    with torch.device(bench.device):
        network = (
            make[0]._from_config(make[1](**fields), attn_implementation="sdpa", dtype=bench.dtype).eval()
        )
    network = network.to(bench.device, bench.dtype)

    def run_stock(items: Sequence[EncodeItem]) -> torch.Tensor:
        longest = max(len(item.token_ids) for item in items)
        ids, mask = np.zeros((2, len(items), longest), np.int64)
        for row, item in enumerate(items):
            ids[row, : len(item.token_ids)] = item.token_ids
            mask[row, : len(item.token_ids)] = 1
        x, m = torch.from_numpy(ids).to(bench.device), torch.from_numpy(mask).to(bench.device)
        with torch.inference_mode():
            states = network(input_ids=x, attention_mask=m).last_hidden_state
            if kind in ("nano", "small"):
                return states[torch.arange(len(items), device=bench.device), m.sum(1) - 1].float().cpu()
            return ((states.float() * m[..., None]).sum(1) / m.sum(1, keepdim=True)).cpu()

    return run_stock


# -- the parts --------------------------------------------------------------------------------------------


def ceilings(bench: Bench, kinds: Sequence[str]) -> None:
    """A large product, a copy, and the products of each model's own shapes."""
    if bench.device.type == "cuda":
        p = torch.cuda.get_device_properties(bench.device)
        say(f"{p.name}, {p.multi_processor_count} SMs; torch {torch.__version__}, cuda {torch.version.cuda}")
    n = 64 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device).to(bench.dtype) for _ in range(2))
    say(f"bf16 product {n}^3: {2e-9 * n**3 / bench.ms(lambda: a @ b):.0f} TFLOP/s")
    rows = 128 if bench.tiny else 16384
    for kind in kinds:
        config, _, _ = _form(kind, bench.tiny)
        width, inner, heads = (config[x] for x in ("hidden_size", "intermediate_size", "num_attention_heads"))
        head_dim = config.get("head_dim") or width // heads
        keys = (config.get("num_key_value_heads") or heads) * head_dim
        ms = work = 0.0
        for out, into in shapes_of(kind, width, inner, heads * head_dim, keys):
            x, weight = (torch.randn(n, into, device=bench.device).to(bench.dtype) for n in (rows, out))
            ms += bench.ms(lambda x=x, weight=weight: functional.linear(x, weight), 20)
            work += 2.0 * rows * out * into
        bench.rates[kind] = 1e3 * work / ms
        say(
            f"  products of {kind}'s shapes, {rows} rows: {work / ms / 1e9:.0f} TFLOP/s, "
            f"a layer {1e3 * ms:.0f} us"
        )


def alone(bench: Bench, model: Model) -> None:
    """One text at a time."""
    words: list[str] = []
    for length in (16, 512):
        items = model.items([length])
        ms = bench.ms(lambda items=items: model.network.forward(items), 50)
        load = model.under_load([length] * 8, 1, 1)
        words.append(
            f"{length} tokens: engine p50 {load.ms(0.5):.2f} p95 {load.ms(0.95):.2f}, forward {ms:.2f} ms"
        )
    say(f"{model.kind} one text alone, " + "; ".join(words))


def callers(bench: Bench, model: Model) -> None:
    """512 callers of one text."""
    load = model.under_load([16] * 2048, 1, 512)
    say(
        f"{model.kind} 512 callers of one text of 16: {load.texts:,.0f} texts/s, "
        f"p50 {load.ms(0.5):.1f} p95 {load.ms(0.95):.1f} ms"
    )


def tasks(bench: Bench, model: Model) -> None:
    """What adapters cost."""
    if not model.adapters:
        return
    lengths = [128] * (8 if bench.tiny else 1024)
    base, one, mixed = (model.forward(model.items(lengths, a)) for a in ((None,), None, model.adapters))
    say(
        f"{model.kind} adapters, texts of 128: none {base:,.0f} tok/s, "
        f"one task {one:,.0f} (+{100 * (base / one - 1):.0f} % "
        f"time), {len(model.adapters)} tasks mixed {mixed:,.0f} (+{100 * (base / mixed - 1):.0f} %)"
    )
    few, several = (model.items([16] * 16, a) for a in (None, model.adapters))
    alone, together = (
        bench.ms(lambda items=items: model.network.forward(items), 20) for items in (few, several)
    )
    count = len(model.adapters)
    say(f"{model.kind} 16 texts of 16: one task {alone:.2f} ms, {count} mixed {together:.2f} ms")
    lengths, per_call = [128] * (8 if bench.tiny else 2048), 2 if bench.tiny else 32
    one, mixed = (model.under_load(lengths, per_call, 64, each).tokens for each in ((), model.tasks))
    say(
        f"{model.kind} engine, 64 calls of {per_call} texts of 128: one task {one:,.0f} tok/s, "
        f"{len(model.tasks)} tasks {mixed:,.0f} (+{100 * (one / mixed - 1):.0f} % time)"
    )


def budgets(bench: Bench, model: Model) -> None:
    """The forward by tokens of a pass."""
    found: list[str] = []
    for budget in (128,) if bench.tiny else (1024, 4096, 8192, 16384, 32768, 65536, 131072):
        rate = model.forward(model.items([128] * (budget // 128)), budget)
        found.append(f"{budget}: {rate:,.0f} ({1e3 * budget / rate:.1f} ms)")
    say(f"{model.kind} forward by tokens of a pass, tok/s: " + ", ".join(found))


def table(bench: Bench, model: Model, cases: Mapping[str, list[int]]) -> None:
    """A line for each length."""
    beside = None
    with attempted(f"padded {model.kind}"):
        beside = padded(bench, model.kind, model.config, model.folder)
    for name, lengths in cases.items():
        if max(lengths) > LONGEST.get(model.kind, 8192) or bench.late():
            continue
        items = model.items(lengths)
        forward = model.forward(items)
        per_call = max(1, min(64, 4096 // int(np.mean(lengths))))
        load = model.under_load(lengths, per_call, 24 if max(lengths) > 4096 else 64)
        order = sorted(items, key=lambda item: len(item.token_ids), reverse=True)
        others: list[float] = []
        for size in (32, 256):
            if beside is None or size * max(lengths) > 600_000:
                others.append(0.0)
                continue
            rate = 0.0
            with attempted(f"padded {size} x {name}"):
                parts = [order[i : i + size] for i in range(0, len(order), size)]
                beside(parts[0])
                rate = _rate(parts, beside, lambda part: sum(len(i.token_ids) for i in part), bench.seconds)
            others.append(rate)
        share = forward * model.operations(lengths) / sum(lengths) / bench.rates[model.kind]
        best = max(others)
        say(
            f"{model.kind} | {name} | forward {forward:,.0f} | {100 * share:.0f} % of own shapes "
            f"| engine {load.tokens:,.0f} "
            f"| {100 * load.tokens / forward:.0f} % of forward | padded {others[0]:,.0f}, {others[1]:,.0f} "
            f"| x {load.tokens / best if best else float('nan'):.2f} | {load.texts:,.0f} texts/s "
            f"p50 {load.ms(0.5):.1f} ms"
        )


def reranker(bench: Bench) -> None:
    """Documents a second of the listwise reranker, texts in and scores out."""
    model = Model(bench, "reranker")
    scorer = model.engine.scorer(NAMES["reranker"])
    chance = random.Random(3)

    async def crowd(documents: Sequence[str], calls: int, until: float) -> int:
        done = 0

        async def client() -> None:
            nonlocal done
            while time.perf_counter() < until:
                await scorer.score("bdfg", documents, ScoreOptions(), Call("bench"))
                done += len(documents)

        await asyncio.gather(*(client() for _ in range(calls)))
        return done

    for count, length in ((2, 20),) if bench.tiny else ((20, 200), (64, 2000)):
        documents = ["".join(chance.choices("bdfgjkmp", k=length)) for _ in range(count)]
        for calls in (1, 8) if length < 1000 else (1,):
            model.loop.run_until_complete(crowd(documents, calls, time.perf_counter() + 0.2))
            started = time.perf_counter()
            done = model.loop.run_until_complete(crowd(documents, calls, started + 2 * bench.seconds))
            rate = done / (time.perf_counter() - started)
            share = rate / count * model.operations([count * length]) / bench.rates["reranker"]
            say(
                f"reranker {count} documents of {length} tokens, {calls} calls in flight: "
                f"{rate:,.0f} documents/s, "
                f"{1e3 * count * calls / rate:.1f} ms a call, {100 * share:.0f} % of own shapes"
            )
    model.stop()


@contextlib.contextmanager
def attempted(what: str) -> Iterator[None]:
    """Say why a part failed, and go on with the next."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (one figure less is better than none)
        say(f"[{what} FAILED: {type(error).__name__}: {str(error)[:300]}]")
        say("\n".join(traceback.format_exc().splitlines()[-8:]))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--cases", nargs="*", default=None, help="lengths, as the table names them")
    parser.add_argument("--parts", nargs="*", default=["alone", "callers", "tasks", "budgets", "table"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement, at least")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds after which no part begins")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are kept")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU; its figures mean nothing")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny rehearses on a CPU")
    started = time.perf_counter()
    cases = {
        n: each
        for n, each in (TINY_LENGTHS if given.tiny else LENGTHS).items()
        if given.cases is None or n in given.cases
    }
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shared_memory = Path("/dev/shm")  # weights are read once; a disk would be what is measured
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as made:
        bench = Bench(
            folder=given.folder or Path(made),
            device=torch.device("cpu" if given.tiny else "cuda"),
            dtype=torch.float32 if given.tiny else torch.bfloat16,
            tiny=given.tiny,
            seconds=0.05 if given.tiny else given.seconds,
            until=started + given.limit,
        )
        parts = {"alone": alone, "callers": callers, "tasks": tasks, "budgets": budgets}
        ceilings(bench, given.models)
        for kind in given.models:
            if bench.late():
                say(f"[{kind}: no time left]")
                continue
            if kind == "reranker":
                with attempted(kind):
                    reranker(bench)
                continue
            with attempted(kind):
                model = Model(bench, kind)
                say(
                    f"{kind}: started in {model.start_seconds:.1f} s, passes of {model.budget} tokens "
                    f"[{time.perf_counter() - started:.0f} s]"
                )
                for name in given.parts:
                    with attempted(f"{kind} {name}"):
                        table(bench, model, cases) if name == "table" else parts[name](bench, model)
                model.stop()
                del model
                if bench.device.type == "cuda":
                    torch.cuda.empty_cache()
        if bench.device.type == "cuda":
            say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        say(f"[{time.perf_counter() - started:.0f} s]")


if __name__ == "__main__":
    main()

"""Engines over the real MiniLM, with hooks to hold its forward passes up, to watch them and to break them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.inference import EmbeddingModel, EmbedOptions, Engine, finish
from services.core.inference.loading import load_model
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.types import EncodeItem, Encoding, Processor, TextEncoder, TextTokenizer
from services.core.settings import Settings

MINILM = "all-MiniLM-L6-v2"

_WORDS = (
    *("river", "stone", "light", "engine", "query", "paper", "garden"),
    *("cloud", "music", "table", "winter", "copper", "island", "bridge"),
)

Hook = Callable[[Sequence[EncodeItem]], None]


def settings(**values: Any) -> Settings:
    return Settings(**{"models": (MINILM,), "device": "cpu", "dtype": "float32", **values})


@cache
def _encoder(dtype: str) -> TextEncoder:
    return load_model(Catalog.load().require(MINILM), settings(dtype=dtype), torch.device("cpu"))


class Watched:
    """A real encoder that tells ``hook`` of each batch before it runs it; what the hook raises, it raises.

    With ``spec`` it is that entry's, with its prompts.
    """

    def __init__(self, encoder: TextEncoder, hook: Hook, spec: ModelSpec | None = None) -> None:
        self._encoder = encoder
        self._hook = hook
        self._processor = TextProcessor(spec, encoder.tokenizer) if spec else encoder.processor

    @property
    def processor(self) -> Processor:
        return self._processor

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._encoder.tokenizer

    @property
    def query_tokenizer(self) -> TextTokenizer:
        return self._encoder.query_tokenizer

    @property
    def width(self) -> int:
        return self._encoder.width

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        self._hook(batch)
        return self._encoder.forward(batch)

    def warm_up(self) -> None:
        self._encoder.warm_up()


def nothing(_: Sequence[EncodeItem]) -> None:
    return None


@asynccontextmanager
async def running(
    hook: Hook = nothing, *, catalog: Catalog | None = None, **values: Any
) -> AsyncIterator[Engine]:
    """An engine with the real network behind ``hook``."""

    def load(spec: ModelSpec, chosen: Settings, _: torch.device) -> TextEncoder:
        return Watched(_encoder(chosen.dtype), hook, spec)

    engine = await Engine.start(settings(**values), catalog or Catalog.load(), load=load)
    try:
        yield engine
    finally:
        await engine.stop(10.0)


def call(**values: Any) -> Call:
    return Call("0" * 32, **values)


def text(words: int, seed: int = 0) -> str:
    chosen = np.random.default_rng(seed).integers(0, len(_WORDS), words)
    return " ".join(_WORDS[i] for i in chosen)


async def embed(model: EmbeddingModel, *texts: str, truncate: bool = False, **values: Any) -> np.ndarray:
    """The normalised vectors of ``texts``, (texts, width)."""
    embeddings = await model.embed(texts, EmbedOptions(truncate=truncate), call(**values))
    return finish(embeddings.vectors)


class Gate:
    """A hook that lets nothing through until it is opened, and remembers what has passed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.seen: list[list[tuple[int, ...]]] = []

    def __call__(self, batch: Sequence[EncodeItem]) -> None:
        with self._lock:
            self.seen.append([tuple(item.token_ids.tolist()) for item in batch])
        assert self._open.wait(30), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """Return when the workers have been waiting at the gate for a moment."""
        before = 0
        while before == 0 or before != len(self.seen):
            before = len(self.seen)
            await asyncio.sleep(0.05)

    @property
    def items(self) -> list[tuple[int, ...]]:
        return [item for batch in self.seen for item in batch]


def ids(model_text: str) -> tuple[int, ...]:
    """Token ids of a text, as the model sees them."""
    return tuple(_encoder("float32").tokenizer.encode_batch([model_text])[0].ids.tolist())

"""A tokenizer, a network and a head put together: the model that the engine calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.cuda import ops as cuda
from services.core.modeling.cuda.frames import Frames
from services.core.modeling.cuda.recording import free_cached
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.layers.merged import Merges
from services.core.modeling.layers.packed import Limits, PackedBatch, lay_out, place, split
from services.core.modeling.layers.pooling import Pooling, span_means
from services.core.modeling.types import (
    TOGETHER_TOKENS,
    Backbone,
    EncodeItem,
    Encoding,
    Head,
    Processor,
    TokenIds,
)

_CPU_PASS_TOKENS = 512
"""Tokens that go through all layers together on a CPU: more only push the activations out of the cache."""

_PREPARE_SECONDS = 10.0
"""For graphs that are made before the first call; the rest are made when they are needed."""

_BATCH_TOKENS = 16384
"""Tokens of a pass before the warm-up has found how many are best."""

_KNEE_TOKENS = (8192, 16384, 32768, 65536, 131072)
_KNEE_TEXT = 128
_KNEE_REPEATS = 2
_KNEE_SHARE = 0.95
_KNEE_SECONDS = 0.025
"""Passes that are tried to find how large they should be, of texts of so many tokens; a pass should make this
part of what the device can do, and a pass that takes longer than this is not made larger."""

Wanted: TypeAlias = Callable[[PackedBatch, Sequence[EncodeItem]], NDArray[np.int32] | None]
"""From a batch and its items, as packed, to the tokens whose states are read; see ``PackedBatch.wanted``."""

Sees: TypeAlias = Callable[[PackedBatch, Sequence[EncodeItem]], PackedBatch]
"""From a batch and its items, as packed, to the batch with what towers make of the items' features among its
tokens (``PackedBatch.inserted``), and with the turns of items that have positions of their own."""


class Encoder:
    """A model in memory; see ``types.TextEncoder`` for the contract."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        backbone: Backbone,
        head: Head,
        *,
        device: torch.device,
        limits: Limits,
        width: int,
        wanted: Wanted | None = None,
        merges: Merges | None = None,
        sees: Sees | None = None,
        processor: Processor | None = None,
        warm: Sequence[EncodeItem] = (),
    ) -> None:
        """Join the parts; ``width`` is that of one result vector. CheckpointError if they do not fit.

        ``wanted`` says which states the head reads where it does not read all. With ``merges`` the network
        rests on one adapter at a time. ``sees`` is needed for items with features, ``processor`` where that
        reads more than texts; ``warm`` are items that the warm-up runs beside its texts.
        """
        if tokenizer.vocabulary_size > limits.vocabulary:
            raise CheckpointError(
                f"tokenizer.json has {tokenizer.vocabulary_size} ids, the network {limits.vocabulary}"
            )
        self.processor: Processor = processor or TextProcessor(spec, tokenizer)
        self.tokenizer = tokenizer
        self.query_tokenizer = tokenizer
        self.width = width
        self._backbone = backbone
        self._head = head
        self._device = device
        self._limits = limits
        self.batch_tokens = _BATCH_TOKENS
        self._wanted = wanted
        self._sees = sees
        self._warm = warm
        self._merges = merges
        # Weights at rest, the buffers of graphs and the order of launches are one pass's at a time.
        self._turn = nullcontext() if device.type == "cpu" else threading.Lock()
        graphs = device.type == "cuda" and cuda.serves_device(device)
        self._frames = Frames(backbone, device, limits.positions) if graphs else None

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        """Run the network; one fp32 result per item, in the order of ``batch``, not normalised."""
        results: list[Encoding] = [None] * len(batch)  # type: ignore[list-item]  (each place is filled)
        under_way: list[_Pass] = []
        with torch.inference_mode():
            for part in self._passes(batch):
                under_way.append(self._begin(batch, part))
                if self._device.type == "cpu":
                    self._end(under_way.pop(), results)
            for each in under_way:
                self._end(each, results)
        return results

    def warm_up(self) -> None:
        """Run short and longer texts, which makes the libraries choose and build their kernels."""
        longest = min(128, self._limits.positions)
        for text in ("warm", "warm up " * 60):
            ids = self.tokenizer.encode_batch([text], truncate_to=longest)[0].ids
            for count in (1, 4):
                self.forward([EncodeItem(ids)] * count)
        for item in self._warm:
            self.forward([item])
        for adapter in sorted(self._limits.adapters) if self._merges is not None else ():
            self.forward([EncodeItem(ids, adapter)])
        if self._merges is not None:
            self.forward([EncodeItem(ids, adapter) for adapter in (None, *sorted(self._limits.adapters))])
        if self._device.type == "cuda":
            self.batch_tokens = self._knee(ids)
            self.prepare()

    def prepare(self) -> None:
        """Make what passes are replayed from, where they are."""
        if self._frames is not None:
            with self._turn:
                tasks = 0 if self._merges is None else 1 + len(self._merges.names)
                self._frames.prepare(
                    self.batch_tokens,
                    _PREPARE_SECONDS,
                    wanted=self._wanted is not None,
                    tagged_tokens=min(self.batch_tokens, TOGETHER_TOKENS * tasks),
                )

    def _knee(self, ids: TokenIds) -> int:
        """Measure from how many tokens on a larger pass makes no more of the device worth its time.

        Stops at passes that a caller would wait for, and at those that do not fit.
        """
        texts = [EncodeItem(np.resize(ids, min(_KNEE_TEXT, self._limits.positions)))]
        rates: dict[int, float] = {}
        for tokens in _KNEE_TOKENS:
            if self._merges is not None and tokens < _BATCH_TOKENS:
                continue  # the passes of a batch of several tasks would be too small
            batch = texts * (tokens // len(texts[0].token_ids))
            try:
                self.forward(batch)
                began = time.perf_counter()
                for _ in range(_KNEE_REPEATS):
                    self.forward(batch)
            except torch.OutOfMemoryError:
                free_cached()
                break
            seconds = (time.perf_counter() - began) / _KNEE_REPEATS
            rates[tokens] = tokens / seconds
            if seconds > _KNEE_SECONDS:
                break
        best = max(rates.values(), default=0.0)
        return min((n for n, rate in rates.items() if rate >= _KNEE_SHARE * best), default=_BATCH_TOKENS)

    def _begin(self, batch: Sequence[EncodeItem], part: list[int]) -> _Pass:
        """Start a pass of the items ``part``: whatever waits for the device is left to ``_end``."""
        items = [batch[i] for i in part]
        packed = lay_out(items, self._limits)
        ordered = [items[i] for i in packed.order]
        if self._wanted is not None:
            packed = replace(packed, wanted=self._wanted(packed, ordered))
        with self._turn:
            if self._merges is not None:
                if len(packed.adapter_runs) > 1:
                    packed = replace(packed, tags=self._merges.tags(packed.adapter_runs))
                else:
                    self._merges.rest_on(items[0].adapter)
            if self._sees is not None:
                packed = self._sees(packed, ordered)
            hidden, placed = self._run(packed)
            fetched = Fetched(self._head(hidden, placed, ordered))
        return _Pass([part[i] for i in packed.order], packed, ordered, fetched)

    def _end(self, under_way: _Pass, results: list[Encoding]) -> None:
        """Wait for a pass and put its results where their items stood."""
        rows = under_way.fetched.wait()
        found = self._head.results(rows, under_way.batch, under_way.items)
        for where, result in zip(under_way.places, found, strict=True):
            results[where] = result

    def _run(self, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        if self._frames is not None:
            return self._frames.run(batch)
        if self._device.type != "cpu" or cuda.serves_device(self._device):
            batch = place(batch, self._device)
        return self._backbone(batch), batch

    def _passes(self, batch: Sequence[EncodeItem]) -> list[list[int]]:
        if self._merges is not None:
            by_task: dict[str, list[int]] = {}
            for i, item in enumerate(batch):
                by_task.setdefault(item.adapter or "", []).append(i)
            tokens = sum(len(item.token_ids) for item in batch)
            if len(by_task) > 1 and tokens <= TOGETHER_TOKENS * len(by_task):
                return [list(range(len(batch)))]
            # The task that the network rests on comes first: its weights need no change.
            resting = self._merges.task or ""
            return [by_task[task] for task in sorted(by_task, key=lambda task: (task != resting, task))]
        if self._device.type != "cpu":
            return [list(range(len(batch)))]
        return split(batch, _CPU_PASS_TOKENS)


class _Pass(NamedTuple):
    """A pass under way: the places of its items in the call, in packed order, and what comes of it."""

    places: list[int]
    batch: PackedBatch
    items: Sequence[EncodeItem]
    fetched: Fetched


class Fetched:
    """Numbers on their way from the device, in one copy, without the host waiting for it meanwhile."""

    def __init__(self, rows: torch.Tensor) -> None:
        """Queue the copy behind what makes ``rows``."""
        self._rows = rows
        self._event: torch.cuda.Event | None = None
        if rows.is_cuda:
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> NDArray[np.float32]:
        """Return the numbers."""
        if self._event is not None:
            self._event.synchronize()
        return cast(NDArray[np.float32], self._rows.numpy())


class DenseHead:
    """One pooled vector per item, or one mean per span where the item asks for spans."""

    def __init__(self, pooling: Pooling) -> None:
        """Pool with ``pooling``; spans are always averaged."""
        self._pooling = pooling

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (items, width) fp32 and behind them, item by item, the spans that are asked for."""
        found = [self._pooling(hidden, batch)]
        if not any(item.spans for item in items):
            return found[0]
        start = 0
        for i, item in enumerate(items):
            end = start + batch.lengths[i]
            if item.spans is not None:
                found.append(span_means(hidden[start:end], item.spans))
            start = end
        return torch.cat(found)

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (width,) fp32 for each item, (spans, width) where spans are asked for."""
        results: list[Encoding] = list(rows[: len(items)])
        if len(rows) == len(items):
            return results
        start = len(items)
        for i, item in enumerate(items):
            if item.spans is not None:
                results[i] = rows[start : start + len(item.spans)]
                start += len(item.spans)
        return results

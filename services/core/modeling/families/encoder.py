"""A tokenizer, a network and a head put together: the model that the engine calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.layers.packed import Limits, PackedBatch, pack, split
from services.core.modeling.layers.pooling import Pooling, span_means
from services.core.modeling.types import Backbone, EncodeItem, Encoding, Head

_CPU_PASS_TOKENS = 512
"""Tokens that go through all layers together on a CPU: more only push the activations out of the cache."""

Wanted: TypeAlias = Callable[[PackedBatch, Sequence[EncodeItem]], NDArray[np.int32] | None]
"""From a batch and its items, as packed, to the tokens whose states are read; see ``PackedBatch.wanted``."""


class Encoder:
    """A model in memory; see ``types.TextEncoder`` for the contract."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        backbone: Backbone,
        head: Head,
        *,
        device: torch.device,
        limits: Limits,
        width: int,
        wanted: Wanted | None = None,
    ) -> None:
        """Join the parts; ``width`` is that of one result vector. CheckpointError if they do not fit.

        ``wanted`` says which states the head reads where it does not read all.
        """
        if tokenizer.vocabulary_size > limits.vocabulary:
            raise CheckpointError(
                f"tokenizer.json has {tokenizer.vocabulary_size} ids, the network {limits.vocabulary}"
            )
        self.tokenizer = tokenizer
        self.query_tokenizer = tokenizer
        self.width = width
        self._backbone = backbone
        self._head = head
        self._device = device
        self._limits = limits
        self._wanted = wanted

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        """Run the network; one fp32 result per item, in the order of ``batch``, not normalised."""
        results: dict[int, Encoding] = {}
        with torch.inference_mode():
            for part in self._passes(batch):
                items = [batch[i] for i in part]
                packed = pack(items, self._device, self._limits)
                ordered = [items[i] for i in packed.order]
                if self._wanted is not None:
                    packed = replace(packed, wanted=self._wanted(packed, ordered))
                encodings = self._head(self._backbone(packed), packed, ordered)
                results |= {part[i]: encoding for i, encoding in zip(packed.order, encodings, strict=True)}
        return [results[i] for i in range(len(batch))]

    def warm_up(self) -> None:
        """Run short and longer texts, which makes the libraries choose and build their kernels."""
        longest = min(128, self._limits.positions)
        for text in ("warm", "warm up " * 60):
            ids = self.tokenizer.encode_batch([text], truncate_to=longest)[0].ids
            for count in (1, 4):
                self.forward([EncodeItem(ids)] * count)

    def _passes(self, batch: Sequence[EncodeItem]) -> list[list[int]]:
        if self._device.type != "cpu":
            return [list(range(len(batch)))]
        return split(batch, _CPU_PASS_TOKENS)


class DenseHead:
    """One pooled vector per item, or one mean per span where the item asks for spans."""

    def __init__(self, pooling: Pooling) -> None:
        """Pool with ``pooling``; spans are always averaged."""
        self._pooling = pooling

    def __call__(
        self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (width,) fp32 for each item, (spans, width) where spans are asked for."""
        pooled = to_numpy(self._pooling(hidden, batch))
        results: list[Encoding] = list(pooled)
        start = 0
        for i, item in enumerate(items):
            end = start + batch.lengths[i]
            if item.spans is not None:
                results[i] = to_numpy(span_means(hidden[start:end], item.spans))
            start = end
        return results


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Bring an fp32 tensor to the host."""
    return cast(NDArray[np.float32], tensor.cpu().numpy())

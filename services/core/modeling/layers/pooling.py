"""From the hidden states of a packed batch to one fp32 vector per item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.native import ops

Pooling: TypeAlias = Callable[[torch.Tensor, PackedBatch], torch.Tensor]
"""(tokens, width) hidden states to (items, width) fp32, in packed order."""


def mean(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Average all tokens of each item, specials included; (items, width) fp32."""
    if batch.rows is not None:
        return cuda.mean(hidden, batch.cu_lengths)
    if hidden.is_cuda:
        # Unsafe means unchecked: the check would wait for the device, and the lengths are ours.
        lengths = batch.cu_lengths.diff().long()
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, unsafe=True)
    if ops.serves_mean(hidden):
        return ops.mean(hidden, batch)
    parts = [
        hidden[g.start : g.end].view(g.count, g.length, -1).mean(1, dtype=torch.float32) for g in batch.groups
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def first(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Take the first token (CLS) of each item; (items, width) fp32."""
    return hidden[batch.cu_lengths[:-1]].float()


def last(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Take the last token of each item; (items, width) fp32."""
    return hidden[batch.cu_lengths[1:] - 1].float()


def span_means(hidden: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Average each half-open token range of one item's (tokens, width); (spans, width) fp32.

    ValueError for a range that is empty or leaves the item.
    """
    for start, end in spans:
        if not 0 <= start < end <= hidden.shape[0]:
            raise ValueError(f"span [{start}, {end}) does not fit an item of {hidden.shape[0]} tokens")
    if all(end - start == 1 for start, end in spans):
        return hidden[[start for start, _ in spans]].float()
    return torch.stack([hidden[start:end].mean(0, dtype=torch.float32) for start, end in spans])


POOLINGS: Mapping[str, Pooling] = {"mean": mean, "first": first, "last": last}

"""Causal attention to the last few tokens only, beside attention to all of them."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.layers.attention import attention, serves_varlen, varlen_attention
from services.core.modeling.layers.packed import PackedBatch

_ROWS = 512
"""Queries that are attended together on a CPU, to at most this many keys more than the window."""


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    *,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Attend inside each item of ``batch``; shapes as of ``attention``.

    With ``window`` a token sees itself and the ``window - 1`` before it. Memory is linear in the length.
    """
    if batch.rows is not None:
        longest, items = batch.max_length, len(batch.lengths)
        return cuda.attention(
            query, key, value, batch.rows, longest=longest, items=items, causal=causal, window=window
        )
    if window is None or batch.max_length <= window:
        return attention(query, key, value, batch, causal=causal)
    if serves_varlen(query):
        return varlen_attention(query, key, value, batch, window=(window - 1, 0), scale=None)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    start = 0
    for length in batch.lengths:
        rows = slice(start, start + length)
        out[rows] = _item(query[rows], key[rows], value[rows], window)
        start += length
    return out


def _item(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Attend inside one item, a few queries at a time to the keys that any of them sees."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    parts: list[torch.Tensor] = []
    for start in range(0, query.shape[0], _ROWS):
        end = min(start + _ROWS, query.shape[0])
        first = max(0, start - window + 1)
        rows = torch.arange(start, end, device=query.device)[:, None]
        columns = torch.arange(first, end, device=query.device)
        seen = (columns <= rows) & (columns > rows - window)
        part = scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=seen, enable_gqa=gqa
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)

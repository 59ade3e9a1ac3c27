"""The one door to attention over a packed batch.

Nothing is padded. On CUDA the whole batch is one call of a kernel of our own, on a CPU of the compiled one,
where it computes with this dtype. On CUDA without Triton it is one of flash attention where that takes it.
Otherwise each group of equally long items runs as one dense call of torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.layers.packed import Group, PackedBatch
from services.core.modeling.native import ops

_BIAS_ELEMENTS = 1 << 24
"""Upper bound of the bias held at a time; 12 heads at 8192 tokens would be 800 million."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    *,
    causal: bool = False,
    alibi_slopes: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend inside each item of ``batch``.

    ``query`` is (tokens, heads, head_dim); ``key`` and ``value`` may have fewer heads, each then serving
    ``heads / key_heads`` query heads. They may be strided views of one projection. ``alibi_slopes``
    (heads,) fp32 adds ``-slope * |i - j|`` to the scaled scores. ``scale`` defaults to
    ``head_dim ** -0.5``. Items of which ``batch.attended`` hides the end are computed by torch. Returns
    (tokens, heads, head_dim), contiguous.
    """
    if batch.rows is not None:
        longest = batch.max_length
        return cuda.attention(
            query,
            key,
            value,
            batch.rows,
            longest=longest,
            items=len(batch.lengths),
            causal=causal,
            slopes=alibi_slopes,
            scale=scale,
        )
    out = _unmasked(query, key, value, batch, causal=causal, alibi_slopes=alibi_slopes, scale=scale)
    for group, visible in _partly_hidden(batch):
        rows = slice(group.start, group.end)
        out[rows] = _group(query[rows], key[rows], value[rows], group, causal, alibi_slopes, scale, visible)
    return out


def _unmasked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    *,
    causal: bool,
    alibi_slopes: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    if ops.serves_attention(query, key, value):
        factor = query.shape[2] ** -0.5 if scale is None else scale
        return ops.attention(query, key, value, batch, causal=causal, slopes=alibi_slopes, scale=factor)
    if alibi_slopes is None and serves_varlen(query):
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attention(query, key, value, batch, window=window, scale=scale)
    if len(batch.groups) == 1:
        return _group(query, key, value, batch.groups[0], causal, alibi_slopes, scale)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for group in batch.groups:
        rows = slice(group.start, group.end)
        out[rows] = _group(query[rows], key[rows], value[rows], group, causal, alibi_slopes, scale)
    return out


def _partly_hidden(batch: PackedBatch) -> Iterator[tuple[Group, torch.Tensor]]:
    """Yield the groups with items that hide their end, and how many tokens each item of them shows."""
    if batch.attended is None:
        return
    item = 0
    for group in batch.groups:
        visible = batch.attended[item : item + group.count]
        item += group.count
        if min(visible) < group.length:
            yield group, torch.tensor(visible, device=batch.device)


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return the (heads,) fp32 slopes of ALiBi.

    The largest power of two p <= heads gives ``2^(-8 (i+1) / p)``; the remaining heads take every other
    slope of the 2p set, appended behind. Source: Press et al., arXiv 2108.12409, and its reference code.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def serves_varlen(query: torch.Tensor) -> bool:
    """Whether flash attention takes this dtype and head width on this device (Ampere or newer)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    *,
    window: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """Attend inside each item to so many tokens before and behind, -1 for all; needs ``serves_varlen``."""
    longest = batch.max_length
    before, behind = window
    # The operator itself: torch.nn.attention.varlen wraps it in another that takes the host 45 us a call.
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        batch.cu_lengths,
        batch.cu_lengths,
        longest,
        longest,
        0.0,
        window == (-1, 0),
        False,
        scale=scale,
        window_size_left=before,
        window_size_right=behind,
    )[0]


def _group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Group,
    causal: bool,
    slopes: torch.Tensor | None,
    scale: float | None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend inside ``group``, whose rows the tensors hold, of each item to its first ``visible`` tokens.

    Returns (rows, heads, head_dim).
    """
    q, k, v = (t.unflatten(0, (group.count, group.length)).transpose(1, 2) for t in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    if slopes is None and visible is None:
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    else:
        out = _biased(q, k, v, slopes, visible, causal=causal, scale=scale, gqa=gqa)
    return out.transpose(1, 2).reshape(query.shape).contiguous()


def _biased(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor | None,
    visible: torch.Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> torch.Tensor:
    """Attention with ALiBi or hidden tokens, in blocks of queries: the bias never stands for a long text.

    In fp32 whatever the dtype: a bias of 100 in bf16 is off by up to a quarter.
    """
    dtype, length = q.dtype, q.shape[2]
    q, k, v = q.float(), k.float(), v.float()
    rows_at_once = max(1, _BIAS_ELEMENTS // (q.shape[1] * length * (1 if visible is None else q.shape[0])))
    positions = torch.arange(length, device=q.device, dtype=torch.float32)
    blocks: list[torch.Tensor] = []
    for start in range(0, length, rows_at_once):
        rows = positions[start : start + rows_at_once, None]
        if slopes is None:
            bias = torch.zeros(1, len(rows), length, device=q.device)
        else:
            bias = (rows - positions).abs_().neg_() * slopes[:, None, None]
        if causal:
            bias.masked_fill_(positions > rows, float("-inf"))
        bias = bias[None]
        if visible is not None:
            bias = bias.masked_fill(positions >= visible[:, None, None, None], float("-inf"))
        part = scaled_dot_product_attention(
            q[:, :, start : start + rows_at_once], k, v, attn_mask=bias, scale=scale, enable_gqa=gqa
        )
        blocks.append(part)
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)).to(dtype)

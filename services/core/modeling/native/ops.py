"""Attention, rotary positions, adapters and mean pooling of a packed batch on the CPU, off the GIL."""

from __future__ import annotations

import ctypes

import torch

from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.native.library import Kernels, library, scratch

_MOST_RANK = 64  # LORA_RANK in lora.h


class _Attention(ctypes.Structure):
    """``struct attention`` of attention.h."""

    _fields_ = (
        ("heads", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("query_stride", ctypes.c_int64),
        ("key_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("slopes", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
    )


def _kernels(tensor: torch.Tensor) -> Kernels | None:
    """Return the kernels that compute with ``tensor`` as it is."""
    if tensor.device.type != "cpu":
        return None
    kernels = library(tensor.dtype)
    return kernels if kernels is not None and kernels.elements == tensor.dtype else None


def _functions(tensor: torch.Tensor) -> ctypes.CDLL:
    kernels = _kernels(tensor)
    assert kernels is not None
    return kernels.functions


def serves_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes these (tokens, heads, head_dim) tensors."""
    return (
        query.shape[2] % 2 == 0
        and all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in (query, key, value))
        and key.stride(0) == value.stride(0)
        and _kernels(query) is not None
    )


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    *,
    causal: bool,
    slopes: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attend inside each item; arguments as ``modeling.attention.attention``, see ``serves_attention``."""
    kernels = _functions(query)
    tokens, heads, head_dim = query.shape
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype)
    form = _Attention(
        heads,
        key.shape[1],
        head_dim,
        causal,
        query.stride(0),
        key.stride(0),
        heads * head_dim,
        0,
        scale,
        None if slopes is None else slopes.data_ptr(),
        None,
    )
    longest, threads = batch.max_length, torch.get_num_threads()
    kernels.sf_attention(
        ctypes.addressof(form),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        batch.cu_lengths.data_ptr(),
        len(batch.lengths),
        scratch(kernels.sf_attention_scratch(head_dim, heads // key.shape[1], threads)),
        longest,
        threads,
    )
    return out


def serves_lora(x: torch.Tensor, rank: int) -> bool:
    """Whether the kernel adds an adapter of ``rank`` to products of ``x`` (rows, into)."""
    return x.is_contiguous() and rank <= _MOST_RANK and _kernels(x) is not None


def lora(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, y: torch.Tensor, *, gelu: bool) -> None:
    """Add ``(x down^T) up`` to ``y`` (rows, out) in place, then, with ``gelu``, take its GELU.

    ``down`` is (rank, into), ``up`` (rank, out), all of them contiguous.
    """
    kernels = _functions(x)
    rows, into = x.shape
    rank, out = up.shape
    kernels.sf_lora(x.data_ptr(), rows, into, down.data_ptr(), up.data_ptr(), rank, out, gelu, y.data_ptr())


def serves_mean(hidden: torch.Tensor) -> bool:
    """Whether the kernel averages these (tokens, width) hidden states."""
    return hidden.is_contiguous() and _kernels(hidden) is not None


def mean(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Average the tokens of each item in fp32; (items, width)."""
    kernels = _functions(hidden)
    items, width = len(batch.lengths), hidden.shape[1]
    out = torch.empty(items, width, dtype=torch.float32)
    kernels.sf_mean(hidden.data_ptr(), batch.cu_lengths.data_ptr(), items, width, out.data_ptr())
    return out


def serves_rope(heads: torch.Tensor) -> bool:
    """Whether the kernel turns these (tokens, heads, head_dim)."""
    return heads.stride(2) == 1 and heads.stride(1) == heads.shape[2] and _kernels(heads) is not None


def rope(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Turn the halves of each head against each other, in place; angles are (tokens, head_dim / 2) fp32."""
    kernels = _functions(heads)
    tokens, count, head_dim = heads.shape
    kernels.sf_rope(
        heads.data_ptr(), tokens, heads.stride(0), count, head_dim, cosines.data_ptr(), sines.data_ptr()
    )

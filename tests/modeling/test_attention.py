"""The attention door against the formula written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from services.core.modeling.layers.attention import alibi_slopes, attention
from services.core.modeling.layers.packed import Limits, PackedBatch, pack
from services.core.modeling.types import EncodeItem

LENGTHS = (1, 2, 5, 5, 16, 17, 33, 64, 65, 65, 130)


def packed(lengths: tuple[int, ...], device: torch.device) -> PackedBatch:
    items = [EncodeItem(np.zeros(length, np.int32)) for length in lengths]
    return pack(items, device, Limits(1, max(lengths)))


def formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    slopes: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale q k^T - slope |i - j|) v, text by text and head by head, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    shared = query.shape[1] // key.shape[1]
    start = 0
    for length in sorted(lengths):
        rows = slice(start, start + length)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        for head in range(query.shape[1]):
            q, k, v = (
                t[rows, h].double()
                for t, h in ((query, head), (key, head // shared), (value, head // shared))
            )
            scores = scale * q @ k.T
            if slopes is not None:
                scores -= slopes[head].double() * distance.abs()
            if causal:
                scores[distance < 0] = -math.inf
            out[rows, head] = scores.softmax(-1) @ v
        start += length
    return out


def tensors(
    heads: int, key_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Query, key and value as views of one fused projection, as the networks hand them over."""
    generator = torch.Generator().manual_seed(heads * head_dim)
    tokens = sum(LENGTHS)
    fused = torch.randn(tokens, heads + 2 * key_heads, head_dim, generator=generator)
    return list(fused.to(device, dtype).split([heads, key_heads, key_heads], dim=1))


FORMS = pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"),
    [(1, 1, 8), (4, 4, 12), (12, 12, 32), (4, 2, 64), (3, 3, 80), (4, 1, 128)],
)


MASKS = pytest.mark.parametrize(
    ("causal", "alibi"), [(False, False), (True, False), (False, True), (True, True)]
)


def check(dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool, alibi: bool) -> None:
    cpu = torch.device("cpu")
    query, key, value = tensors(heads, key_heads, head_dim, dtype, cpu)
    slopes = alibi_slopes(heads) if alibi else None
    got = attention(query, key, value, packed(LENGTHS, cpu), causal=causal, alibi_slopes=slopes)
    wanted = formula(query, key, value, LENGTHS, causal=causal, slopes=slopes, scale=head_dim**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.shape == query.shape
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=0)


@FORMS
@MASKS
def test_fp32_attention_is_the_formula(
    heads: int, key_heads: int, head_dim: int, causal: bool, alibi: bool
) -> None:
    check(torch.float32, heads, key_heads, head_dim, causal, alibi)


@pytest.mark.usefixtures("backend")
@FORMS
@MASKS
def test_bf16_attention_is_the_formula(
    heads: int, key_heads: int, head_dim: int, causal: bool, alibi: bool
) -> None:
    check(torch.bfloat16, heads, key_heads, head_dim, causal, alibi)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_scale_replaces_the_usual_one(cpu: torch.device, dtype: torch.dtype) -> None:
    query, key, value = tensors(2, 2, 16, dtype, cpu)
    got = attention(query, key, value, packed(LENGTHS, cpu), scale=0.9)
    wanted = formula(query, key, value, LENGTHS, causal=False, slopes=None, scale=0.9)
    torch.testing.assert_close(got.double(), wanted, atol=2e-2, rtol=0)


@pytest.mark.usefixtures("backend")
def test_scores_far_apart_neither_overflow_nor_fade(cpu: torch.device) -> None:
    query, key, value = (40 * t for t in tensors(2, 2, 32, torch.bfloat16, cpu))
    got = attention(query, key, value, packed(LENGTHS, cpu))
    wanted = formula(query, key, value, LENGTHS, causal=False, slopes=None, scale=32**-0.5)
    torch.testing.assert_close(got.double(), wanted, atol=0.5, rtol=1e-2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_over_a_long_text_holds_no_table(
    cpu: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.core.modeling.layers.attention._BIAS_ELEMENTS", 10_000)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(700, 3, 16, generator=generator).to(dtype) for _ in range(3))
    slopes = alibi_slopes(3)
    got = attention(query, key, value, packed((700,), cpu), alibi_slopes=slopes)
    wanted = formula(query, key, value, (700,), causal=False, slopes=slopes, scale=0.25)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (7, 1)])
@MASKS
def test_texts_of_several_blocks_of_keys(
    cpu: torch.device, heads: int, key_heads: int, causal: bool, alibi: bool
) -> None:
    lengths = (3, 383, 385, 511, 513, 1030)
    generator = torch.Generator().manual_seed(heads)
    fused = torch.randn(sum(lengths), heads + 2 * key_heads, 32, generator=generator).bfloat16()
    query, key, value = fused.split([heads, key_heads, key_heads], dim=1)
    slopes = alibi_slopes(heads) if alibi else None
    query *= torch.linspace(0.1, 8.0, sum(lengths))[:, None, None]  # peaks that come late, and early
    got = attention(query, key, value, packed(lengths, cpu), causal=causal, alibi_slopes=slopes)
    wanted = formula(query, key, value, lengths, causal=causal, slopes=slopes, scale=32**-0.5)
    torch.testing.assert_close(got.double(), wanted, atol=4e-2, rtol=0)


def test_slopes_of_twelve_heads_are_eight_and_then_four() -> None:
    slopes = alibi_slopes(12).tolist()
    assert slopes[:8] == [2.0**-i for i in range(1, 9)]
    assert slopes[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@FORMS
@MASKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_cuda_is_the_formula(
    heads: int, key_heads: int, head_dim: int, causal: bool, alibi: bool, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    query, key, value = tensors(heads, key_heads, head_dim, dtype, device)
    slopes = alibi_slopes(heads).to(device) if alibi else None
    got = attention(query, key, value, packed(LENGTHS, device), causal=causal, alibi_slopes=slopes)
    cpu_slopes = None if slopes is None else slopes.cpu()
    wanted = formula(
        query.cpu(), key.cpu(), value.cpu(), LENGTHS, causal=causal, slopes=cpu_slopes, scale=head_dim**-0.5
    )
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.cpu().double(), wanted, atol=tolerance, rtol=0)

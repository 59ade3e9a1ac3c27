"""Rotary positions against float64, over views of a projection as the networks use them."""

from __future__ import annotations

import math

import pytest
import torch

from services.core.modeling.layers.rotary import Rotation


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 80, 128])
def test_the_turn_is_that_of_float64(head_dim: int, dtype: torch.dtype, allowed: float) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    joined = torch.randn(7, 5, head_dim, generator=generator).to(dtype)
    before = joined.double()
    positions = torch.tensor([0, 1, 2, 0, 1, 500, 501], dtype=torch.int32)
    Rotation(positions, head_dim, 10000.0).rope(joined[:, :3])
    assert torch.equal(joined[:, 3:].double(), before[:, 3:])
    half = head_dim // 2
    turned = joined[:, :3].double()
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * 10000.0 ** (-i / half)
            a, b = before[token, :3, i], before[token, :3, half + i]
            first = a * math.cos(angle) - b * math.sin(angle)
            second = b * math.cos(angle) + a * math.sin(angle)
            wanted = torch.stack([first, second], dim=1)
            found = turned[token][:, [i, half + i]]
            torch.testing.assert_close(found, wanted, atol=allowed, rtol=allowed)

"""Rotary positions (Su et al., arXiv 2104.09864), the form that turns the two halves of a head."""

from __future__ import annotations

import torch

from services.core.modeling.native import ops


class Rotation:
    """The turn of each token of a batch; angles, cosines and sines are fp32."""

    def __init__(self, positions: torch.Tensor, head_dim: int, base: float) -> None:
        """Prepare for ``positions`` (tokens,) and heads of ``head_dim``, an even number."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions[:, None].float() * base**-exponents
        self._cosines = angles.cos()
        self._sines = angles.sin()

    def turn(self, heads: torch.Tensor) -> None:
        """Turn ``heads`` (tokens, heads, head_dim) in place; computed in fp32."""
        if ops.serves_turn(heads):
            ops.turn(heads, self._cosines, self._sines)
            return
        cosines, sines = self._cosines[:, None], self._sines[:, None]
        first, second = heads.chunk(2, dim=-1)
        a, b = first.float(), second.float()
        turned = a * cosines - b * sines
        second.copy_(b * cosines + a * sines)
        first.copy_(turned)

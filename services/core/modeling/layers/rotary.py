"""Rotary positions (Su et al., arXiv 2104.09864), the form that turns the two halves of a head."""

from __future__ import annotations

from typing import Self

import torch

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.native import ops


class Rotation:
    """The turn of each token of a batch; ``cosines`` and ``sines`` are (tokens, head_dim / 2) fp32."""

    def __init__(self, positions: torch.Tensor, head_dim: int, base: float) -> None:
        """Prepare for ``positions`` (tokens,) and heads of ``head_dim``, an even number."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions[:, None].float() * base**-exponents
        self.cosines = angles.cos()
        self.sines = angles.sin()

    @classmethod
    def by(cls, angles: torch.Tensor) -> Self:
        """Prepare for ``angles`` (tokens, head_dim / 2) fp32 of any other kind."""
        rotation = cls.__new__(cls)
        rotation.cosines, rotation.sines = angles.cos(), angles.sin()
        return rotation

    def repeated(self, times: int) -> Rotation:
        """The same turns for ``times`` items behind one another."""
        rotation = Rotation.__new__(Rotation)
        rotation.cosines, rotation.sines = self.cosines.repeat(times, 1), self.sines.repeat(times, 1)
        return rotation

    def rope(self, heads: torch.Tensor) -> None:
        """Turn ``heads`` (tokens, heads, head_dim) in place; computed in fp32."""
        if ops.serves_rope(heads):
            ops.rope(heads, self.cosines, self.sines)
            return
        if cuda.serves(heads):
            cuda.norm_rope(heads, self.cosines, self.sines, heads.shape[1], 0)
            return
        cosines, sines = self.cosines[:, None], self.sines[:, None]
        first, second = heads.chunk(2, dim=-1)
        a, b = first.float(), second.float()
        turned = a * cosines - b * sines
        second.copy_(b * cosines + a * sines)
        first.copy_(turned)

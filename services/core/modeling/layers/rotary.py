"""Rotary positions (Su et al., arXiv 2104.09864), the form that turns the two halves of a head.

With several axes (time, row, column) each takes a section of a head's frequencies: Wang et al., arXiv
2409.12191.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def sections(self, positions: torch.Tensor, sizes: Sequence[int]) -> Rotation:
        """From the turns of the positions 0, 1, 2 and so on those of ``positions`` (axes, tokens).

        Axis i has ``sizes[i]`` frequencies, behind those of the axes before it; together they have all.
        """
        turns = Rotation.__new__(Rotation)
        turns.cosines, turns.sines = (
            torch.cat([part[at] for part, at in zip(table.split(list(sizes), 1), positions, strict=True)], 1)
            for table in (self.cosines, self.sines)
        )
        return turns

    def beside(self, places: torch.Tensor) -> Rotation:
        """From the turns of the positions 0, 1, 2 and so on those of ``places`` (tokens, axes).

        Each axis has all frequencies, beside those of the axis before it.
        """
        turns = Rotation.__new__(Rotation)
        turns.cosines, turns.sines = (table[places].flatten(1) for table in (self.cosines, self.sines))
        return turns

    def rows(self, rows: slice) -> Rotation:
        """The turns of neighbouring tokens."""
        part = Rotation.__new__(Rotation)
        part.cosines, part.sines = self.cosines[rows], self.sines[rows]
        return part

    def to(self, device: torch.device) -> Rotation:
        """The same turns on ``device``."""
        if self.cosines.device == device:
            return self
        moved = Rotation.__new__(Rotation)
        moved.cosines, moved.sines = (
            (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
            for table in (self.cosines, self.sines)
        )
        return moved

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

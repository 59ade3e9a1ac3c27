"""Cosines and sines of rotary positions, as the compiled passes read them."""

from __future__ import annotations

import torch

from services.core.modeling.layers.rotary import Rotation

_KEPT_POSITIONS = 8192
"""Positions whose angles are kept between calls; those of a longer text are made for it."""


class Angles:
    """Angles of the positions from 0, made as far as they are needed."""

    def __init__(self, head_dim: int, base: float) -> None:
        """``base`` is that of the angles of heads of ``head_dim``, an even number."""
        self._head_dim = head_dim
        self._base = base
        self._kept = self._made(0)

    def up_to(self, longest: int) -> Rotation:
        """Return at least ``longest`` positions. Another thread may make the same ones meanwhile."""
        angles = self._kept
        if len(angles.cosines) < longest:
            angles = self._made(max(longest, 2 * len(angles.cosines)))
            if longest <= _KEPT_POSITIONS:
                self._kept = angles
        return angles

    def _made(self, positions: int) -> Rotation:
        made = Rotation(torch.arange(positions, dtype=torch.int32), self._head_dim, self._base)
        assert made.cosines.is_contiguous()
        assert made.sines.is_contiguous()
        return made

"""Layers made from the tensors of a checkpoint, and the names and shapes those must have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.core.modeling.checkpoints.checkpoint import Checkpoint, Shape
from services.core.modeling.layers.linear import GatedUnit, Linear, gated_gelu, linear
from services.core.modeling.layers.post_norm import Norm


def linear_shapes(name: str, out: int, into: int, *, bias: bool = True) -> dict[str, Shape]:
    """Names and shapes of a linear layer."""
    weight: dict[str, Shape] = {f"{name}.weight": (out, into)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def norm_shapes(name: str, width: int) -> dict[str, Shape]:
    """Names and shapes of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@dataclass(frozen=True, slots=True)
class Layers:
    """Reads layers of ``checkpoint`` onto ``device`` as ``dtype``; ``epsilon`` is that of its norms."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    epsilon: float = 0.0

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.place(self.checkpoint.tensor(name))

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a tensor to the device and dtype."""
        return tensor.to(self.device, self.dtype)

    def linear(self, *names: str) -> Linear:
        """One layer that computes all of ``names`` behind one another."""
        bias = torch.cat([self.checkpoint.tensor(f"{name}.bias") for name in names])
        weight = torch.cat([self.checkpoint.tensor(f"{name}.weight") for name in names])
        return self.joined(weight, bias)

    def joined(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Make a layer of ``weight`` (out, in) and ``bias`` (out,)."""
        return linear(weight.to(self.dtype), None if bias is None else bias.to(self.dtype), self.device)

    def gated_gelu(self, gate: torch.Tensor, up: torch.Tensor) -> GatedUnit:
        """Make a gated unit of the weights ``gate`` and ``up``, (inner, in) each."""
        return gated_gelu(gate.to(self.dtype), up.to(self.dtype), self.device)

    def norm(self, name: str) -> Norm:
        """A layer norm."""
        return Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), self.epsilon)

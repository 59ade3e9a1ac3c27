"""Linear layers whose weights are laid out once for the device they run on.

On a CPU oneDNN takes the weight in its own blocked layout, made here once instead of in each call, and
joins the activation or the residual to the product (measured on two cores: 1.3 to 1.6 times as fast as
``torch.nn.functional.linear`` for 16 to 512 rows of 384).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.native.instructions import InstructionSet, current


class Linear(Protocol):
    """``x W^T + b`` over (rows, in) in the layer's dtype."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, (rows, out)."""
        ...

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product under the erf form of GELU, (rows, out)."""
        ...

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product under SiLU, (rows, out)."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual``, (rows, out); ``residual`` itself is left alone."""
        ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), maybe in the memory of that."""
        ...

    def mul(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return the product times ``factor`` (rows, out), number by number."""
        ...


def linear(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Make a layer on ``device`` of ``weight`` (out, in) and ``bias`` (out,), in their dtype."""
    if device.type != "cpu" or cuda.serves_device(device):
        make = FusedLinear if cuda.serves_device(device) else _TorchLinear
        return make(weight.to(device), None if bias is None else bias.to(device))
    if weight.dtype == torch.bfloat16 and not _onednn_takes_bf16():
        return _WidenedLinear(weight, bias)
    if torch.backends.mkldnn.is_available():
        return _OneDnnLinear(weight, bias)
    return _TorchLinear(weight, bias)


def _onednn_takes_bf16() -> bool:
    lowered = current() in (InstructionSet.AVX2, InstructionSet.PORTABLE)
    return not lowered and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _TorchLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self(x))

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(self(x), inplace=True)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(x).add_(residual)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, residual)

    def mul(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(factor)


class FusedLinear(_TorchLinear):
    """On CUDA: what comes behind the product is a kernel of our own, or joins the product."""

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product under the erf form of GELU, (rows, out)."""
        if cuda.joins(x, self._weight, gated=False):
            return cuda.product(x, self._weight, self._bias, gelu=True, gated=False)
        return cuda.gelu_(self(x))

    def gated(self, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """Return ``activation(a) * b`` of the product [a b], (rows, out / 2); SiLU or erf GELU."""
        if self._bias is None and cuda.joins(x, self._weight, gated=True):
            return cuda.product(x, self._weight, None, gelu=gelu, gated=True)
        return cuda.gate(self(x), gelu=gelu)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), maybe in the memory of that."""
        if self._bias is not None:
            return self.add(x, residual)
        return residual.addmm_(x, self._weight.t())


class _WidenedLinear(_TorchLinear):
    """bf16 where the processor has no product for it: multiplied in fp32, rounded once.

    torch's own bf16 product takes some 60 times as long as an fp32 one on such a processor.
    """

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._bias is None else self._bias.float()
        return functional.linear(x.float(), self._weight.float(), bias).to(self._weight.dtype)


class _OneDnnLinear:
    """oneDNN's product in its own layout, with what follows joined to it where that is no slower.

    On AVX2 its SiLU and GELU behind a product of 512 x 1280 by 3420 take a fifth of the product's time,
    torch's over the result a twentieth.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._joined_product = torch.ops.mkldnn._linear_pointwise.binary
        self._joins = current() is not InstructionSet.AVX2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self._weight, self._bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        if self._joins:
            return self._product(x, self._weight, self._bias, "gelu", [], "none")
        return torch.ops.aten.gelu_(self(x))

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        if self._joins:
            return self._product(x, self._weight, self._bias, "swish", [], "")
        return functional.silu(self(x), inplace=True)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._joined_product(x, residual, self._weight, self._bias, "add")

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, residual)

    def mul(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self._joined_product(x, factor, self._weight, self._bias, "mul")


class GatedUnit(Protocol):
    """``gelu(gate x) * (up x)``."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return it for ``x`` (rows, in), (rows, inner)."""
        ...


def gated_gelu(gate: torch.Tensor, up: torch.Tensor, device: torch.device) -> GatedUnit:
    """Make a unit of the weights ``gate`` and ``up``, (inner, in) each, in their dtype."""
    if cuda.serves_device(device):
        return _JoinedGate(FusedLinear(torch.cat([gate, up]).to(device), None))
    return _TwoProducts(linear(gate, None, device), linear(up, None, device))


class _JoinedGate:
    """One product, with the gating behind it."""

    def __init__(self, joined: FusedLinear) -> None:
        self._joined = joined

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._joined.gated(x, gelu=True)


class _TwoProducts:
    """Two products, so that the activation and the gating join them."""

    def __init__(self, gate: Linear, up: Linear) -> None:
        self._gate = gate
        self._up = up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._up.mul(x, self._gate.gelu(x))

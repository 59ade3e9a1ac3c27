"""The encoder block of BERT and XLM-R: attention and feed-forward, each followed by residual and norm.

The weights are held apart from what runs them, so that the torch form here and the compiled form in
``native`` take the same ones. What JinaBERT and XLM-R with rotary positions have besides is described here
too, for the compiled form; their torch forms are in their own modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import Checkpoint
from services.core.modeling.cuda import ops as cuda
from services.core.modeling.layers.attention import attention
from services.core.modeling.layers.linear import Linear, linear
from services.core.modeling.layers.packed import PackedBatch


class LowRank(NamedTuple):
    """What a task adapter adds to a linear layer: ``a`` (rank, in) and ``b`` (out, rank), scaled."""

    a: torch.Tensor
    b: torch.Tensor


class Dense(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear layer, and the adapters of the tasks that change it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tasks: Mapping[str, LowRank] = {}


class NormWeights(NamedTuple):
    """Weight and bias (width,) of a layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str) -> NormWeights:
        """Read the norm ``name``."""
        return cls(checkpoint.tensor(f"{name}.weight"), checkpoint.tensor(f"{name}.bias"))


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. ``query_key_value`` holds the three projections behind one another, (3 width, width).

    With a ``gate`` the feed-forward is ``down(gelu(gate x) * (up x))``. ``query_norm`` and ``key_norm`` go
    over the full width. With an ``input_norm`` the block's input is added behind ``attended_norm`` again.
    """

    query_key_value: Dense
    attended: Dense
    attended_norm: NormWeights
    up: Dense
    down: Dense
    down_norm: NormWeights
    gate: Dense | None = None
    query_norm: NormWeights | None = None
    key_norm: NormWeights | None = None
    input_norm: NormWeights | None = None


@dataclass(frozen=True, slots=True)
class PostNormWeights:
    """A whole encoder on the host, in the dtype of the checkpoint.

    ``words`` (vocabulary, width); ``positions`` (positions, width) with the token type of a single text
    already added. ``layers`` may be a generator, read once, so that only one block is held twice.

    Where positions are rotary, of ``rotary_base``, or ALiBi's, ``positions`` holds the token type alone: one
    row, and one more for each of ``tasks``. ``word_tasks`` has for each task A (vocabulary, rank) and B
    (rank, width).
    """

    words: torch.Tensor
    positions: torch.Tensor
    norm: NormWeights
    layers: Iterable[LayerWeights]
    heads: int
    epsilon: float
    alibi: bool = False
    rotary_base: float | None = None
    tasks: tuple[str, ...] = ()
    rank: int = 0
    word_tasks: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])


class Summand(Protocol):
    """A layer to whose result something may be added."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result, (rows, width)."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the result plus ``residual``, which is left alone."""
        ...


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer norm over the last axis; the statistics are fp32 whatever the dtype."""

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``x``, (rows, width)."""
        if cuda.serves(x):
            return cuda.layer_norm(x, self.weight, self.bias, self.epsilon)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

    def behind(self, layer: Summand, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``layer`` of ``x`` plus ``residual`` (rows, width)."""
        if cuda.serves(x):
            return cuda.layer_norm(layer(x), self.weight, self.bias, self.epsilon, residual)
        return self(layer.add(x, residual))


@dataclass(frozen=True, slots=True)
class _Layer:
    heads: int
    query_key_value: Linear
    attended: Linear
    attended_norm: Norm
    up: Linear
    down: Linear
    down_norm: Norm

    def __call__(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        query, key, value = self.query_key_value(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        attended = attention(query, key, value, batch).view(x.shape)
        x = self.attended_norm.behind(self.attended, attended, x)
        return self.down_norm.behind(self.down, self.up.gelu(x), x)


class PostNorm:
    """The network in torch operations, for every device and dtype."""

    def __init__(self, weights: PostNormWeights, device: torch.device, dtype: torch.dtype) -> None:
        """Bring ``weights`` to ``device`` as ``dtype``."""
        self._device = device
        self._dtype = dtype
        self._words = weights.words.to(device, dtype)
        self._positions = weights.positions.to(device, dtype)
        self._norm = self._gain(weights.norm, weights.epsilon)
        self._layers = [self._layer(layer, weights) for layer in weights.layers]

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width)."""
        x = functional.embedding(batch.token_ids, self._words)
        x = self._norm(x.add_(functional.embedding(batch.positions(), self._positions)))
        for layer in self._layers:
            x = layer(x, batch)
        return x

    def _gain(self, gain: NormWeights, epsilon: float) -> Norm:
        return Norm(
            gain.weight.to(self._device, self._dtype), gain.bias.to(self._device, self._dtype), epsilon
        )

    def _dense(self, dense: Dense) -> Linear:
        bias = None if dense.bias is None else dense.bias.to(self._dtype)
        return linear(dense.weight.to(self._dtype), bias, self._device)

    def _layer(self, layer: LayerWeights, weights: PostNormWeights) -> _Layer:
        return _Layer(
            heads=weights.heads,
            query_key_value=self._dense(layer.query_key_value),
            attended=self._dense(layer.attended),
            attended_norm=self._gain(layer.attended_norm, weights.epsilon),
            up=self._dense(layer.up),
            down=self._dense(layer.down),
            down_norm=self._gain(layer.down_norm, weights.epsilon),
        )

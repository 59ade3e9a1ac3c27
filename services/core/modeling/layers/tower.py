"""What the towers of the Qwen families share: normed pixels to states, and blocks over packed items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.core.modeling.layers.attention import attention
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.native import ops

CHANNELS = 3

Function = Callable[[torch.Tensor], torch.Tensor]
"""Of rows of states, one by one."""


class PatchEmbedding:
    """The first states of patches, from their pixels; ``rows`` patches at a time stand in fp32."""

    def __init__(
        self,
        product: Linear,
        mean: Sequence[float],
        std: Sequence[float],
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Norm the pixels by ``mean`` and ``std`` of each channel, of values from 0 to 1."""
        self._product = product
        self._mean, self._std = (
            torch.tensor(each, dtype=torch.float32, device=device)[:, None] * 255.0 for each in (mean, std)
        )
        self._rows = rows
        self._dtype = dtype

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """From (patches, channels * pixels) uint8 to (patches, width)."""
        parts = [self._embed(part) for part in patches.split(self._rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _embed(self, part: torch.Tensor) -> torch.Tensor:
        values = part.float().view(len(part), CHANNELS, -1).sub_(self._mean).div_(self._std)
        return self._product(values.flatten(1).to(self._dtype))


@dataclass(frozen=True, slots=True)
class TowerBlock:
    """Attention and feed-forward, each behind its norm; ``inner`` is the feed-forward up to ``down``."""

    heads: int
    norm: Function
    query_key_value: Linear
    attended: Linear
    inner_norm: Function
    inner: Function
    down: Linear

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rotation: Rotation | None = None) -> torch.Tensor:
        """Return the states behind the block, (rows, width); each sees those of its item of ``batch``."""
        joined = self.query_key_value(self.norm(x)).view(x.shape[0], 3 * self.heads, -1)
        if rotation is not None:
            rotation.rope(joined[:, : 2 * self.heads])
        x = self.attended.add_to(x, _attend(joined, batch))
        return self.down.add_to(x, self.inner(self.inner_norm(x)))


def _attend(joined: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Attend inside each item of ``batch``: from heads of query, key and value to (rows, width)."""
    query, key, value = joined.chunk(3, 1)
    if joined.device.type == "cpu" and not ops.serves_attention(query, key, value):
        # Where the processor has no products of bf16, torch's attention of it takes many times as long.
        query, key, value = joined.float().chunk(3, 1)
    return attention(query, key, value, batch).flatten(1).to(joined.dtype)

"""The vision tower of Qwen3-VL: pictures and films of any size, many in one pass.

A pre-norm ViT over the patches of two frames each; a learned table of positions is stretched over a
picture, its corners on the picture's, and each patch is turned by its row and column. What joins four
patches to one state of the language model is not part of it here, since there is one for each task. Source:
Bai et al., arXiv 2511.21631; the tensors of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config, Shape, positive
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.families.qwen_vision import Grid, Layout
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.packed import pinned, segments
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.layers.tower import CHANNELS, PatchEmbedding, TowerBlock
from services.core.modeling.types import Feature

_BASE = 10000.0
_EPSILON = 1e-6
_ROWS = 1 << 13
"""Patches whose pixels are normed together, so that no more of them stand in fp32."""


@dataclass(frozen=True, slots=True)
class Qwen3VisionConfig:
    """The numbers of ``vision_config`` that fix the network.

    ``patch`` pixels on a side of two frames make a patch, ``merge`` patches on a side a state; the table of
    positions has ``side`` rows and columns.
    """

    width: int
    layers: int
    heads: int
    inner: int
    patch: int
    merge: int
    side: int

    @classmethod
    def read(cls, config: Config) -> Qwen3VisionConfig:
        """Parse ``vision_config``. CheckpointError for a number that does not fit and for what is not
        served.
        """
        refuse_unless(config, "hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
        refuse_unless(config, "in_channels", CHANNELS, default=CHANNELS)
        refuse_unless(config, "temporal_patch_size", 2, default=2)
        refuse_unless(config, "deepstack_visual_indexes", [], default=[])
        width, heads = positive(config, "hidden_size"), positive(config, "num_heads")
        if width % heads or width // heads % 4:
            raise CheckpointError(f"config.json: a width of {width} does not make {heads} heads")
        positions = positive(config, "num_position_embeddings")
        side = round(positions**0.5)
        if side**2 != positions or side < 2:
            raise CheckpointError(f"config.json: {positions} positions do not make a square")
        return cls(
            width=width,
            layers=positive(config, "depth"),
            heads=heads,
            inner=positive(config, "intermediate_size"),
            patch=positive(config, "patch_size"),
            merge=positive(config, "spatial_merge_size"),
            side=side,
        )

    @property
    def multiple(self) -> int:
        """Pixels on a side of what becomes one state."""
        return self.patch * self.merge


def qwen3_vision_shapes(config: Qwen3VisionConfig, prefix: str) -> dict[str, Shape]:
    """Names and shapes of all tensors of the tower."""
    width = config.width
    shapes: dict[str, Shape] = {
        f"{prefix}patch_embed.proj.weight": (width, CHANNELS, 2, config.patch, config.patch),
        f"{prefix}patch_embed.proj.bias": (width,),
        f"{prefix}pos_embed.weight": (config.side**2, width),
    }
    for i in range(config.layers):
        name = f"{prefix}blocks.{i}"
        shapes |= {**norm_shapes(f"{name}.norm1", width), **norm_shapes(f"{name}.norm2", width)}
        shapes |= linear_shapes(f"{name}.attn.qkv", 3 * width, width)
        shapes |= linear_shapes(f"{name}.attn.proj", width, width)
        shapes |= linear_shapes(f"{name}.mlp.linear_fc1", config.inner, width)
        shapes |= linear_shapes(f"{name}.mlp.linear_fc2", width, config.inner)
    return shapes


def film_rows(frames: NDArray[np.uint8], patch: int, merge: int) -> torch.Tensor:
    """Lay each patch of ``frames`` (n, height, width, 3), n even, out as a row; uint8.

    A row goes by channel, frame, row and column of pixels. Patches that become one state are neighbours.
    """
    count, height, width = frames.shape[:3]
    cut = torch.from_numpy(frames).view(
        count // 2,
        2,
        height // patch // merge,
        merge,
        patch,
        width // patch // merge,
        merge,
        patch,
        CHANNELS,
    )
    return cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 2 * CHANNELS * patch * patch)


class Qwen3Vision:
    """The network."""

    def __init__(
        self,
        layers: Layers,
        config: Qwen3VisionConfig,
        prefix: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Read the weights; ``mean`` and ``std`` of each channel, of values from 0 to 1, norm the pixels."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, _EPSILON)
        self.config = config
        self._device, self._dtype = layers.device, layers.dtype
        name = f"{prefix}patch_embed.proj"
        weight, bias = (layers.checkpoint.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        product = layers.joined(weight.flatten(1), bias)
        self._patches = PatchEmbedding(product, mean, std, _ROWS, layers.device, layers.dtype)
        table = layers.checkpoint.tensor(f"{prefix}pos_embed.weight", torch.float32)
        self._table = table.view(config.side, config.side, -1).to(layers.device)
        self._blocks = [_block(layers, config, f"{prefix}blocks.{i}") for i in range(config.layers)]

    def __call__(self, films: Sequence[Feature]) -> torch.Tensor:
        """From ``film_rows`` of ``films`` to the states of their patches, (patches, width)."""
        config = self.config
        grids = [cast(Grid, each.grid) for each in films]
        layout = Layout.of(grids, config.merge, 0)
        rows = pinned(torch.cat([each.data for each in films])).to(self._device, non_blocking=True)
        x = self._patches(rows)
        places = torch.from_numpy(layout.places).to(self._device)
        x += self._positions(grids, places)
        sides = torch.arange(int(layout.places.max()) + 1, device=self._device)
        turns = Rotation(sides, config.width // config.heads // 2, _BASE).beside(places)
        wholes = segments(layout.wholes, self._device)
        for block in self._blocks:
            x = block(x, wholes, turns)
        return x

    def _positions(self, grids: Sequence[Grid], places: torch.Tensor) -> torch.Tensor:
        """Return what the table, stretched over each picture, has for each patch, in the network's dtype."""
        found: list[torch.Tensor] = []
        start = 0
        for frames, rows, columns in grids:
            count = rows * columns
            row, column = places[start : start + count].T
            found.append(self._stretched(rows, columns)[row, column].to(self._dtype).repeat(frames, 1))
            start += frames * count
        return torch.cat(found)

    def _stretched(self, rows: int, columns: int) -> torch.Tensor:
        """Interpolate between the four nearest of the table, (rows, columns, width) fp32."""
        tops, down = self._between(rows)
        lefts, across = self._between(columns)
        bottoms, rights = (each.add(1).clamp_(max=self.config.side - 1) for each in (tops, lefts))
        upper, lower = self._table[tops], self._table[bottoms]
        whole = upper + (lower - upper) * down[:, None, None]
        left, right = whole[:, lefts], whole[:, rights]
        return left + (right - left) * across[:, None]

    def _between(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for so many places from the first to the last of a side the one before, and how far
        behind.
        """
        at = torch.linspace(0, self.config.side - 1, count, device=self._device)
        before = at.floor()
        return before.long(), at - before


def _block(layers: Layers, config: Qwen3VisionConfig, name: str) -> TowerBlock:
    """Read block ``name``."""
    return TowerBlock(
        heads=config.heads,
        norm=layers.norm(f"{name}.norm1"),
        query_key_value=layers.linear(f"{name}.attn.qkv"),
        attended=layers.linear(f"{name}.attn.proj"),
        inner_norm=layers.norm(f"{name}.norm2"),
        inner=_TanhGelu(layers.linear(f"{name}.mlp.linear_fc1")),
        down=layers.linear(f"{name}.mlp.linear_fc2"),
    )


@dataclass(frozen=True, slots=True)
class _TanhGelu:
    """The tanh form of GELU of ``up x``."""

    up: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.up(x), approximate="tanh")

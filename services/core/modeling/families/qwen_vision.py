"""The vision towers of Qwen2-VL and Qwen2.5-VL: pictures of any size, many in one pass.

A pre-norm ViT over the patches of all pictures behind one another, each turned by its row and column; two by
two the patches become one state of the language model. In Qwen2.5-VL most blocks see a window of the picture
only, for which the patches are put into another order, undone behind the last block. Sources: Wang et al.,
arXiv 2409.12191; Bai et al., arXiv 2502.13923; the tensors of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.content import Scaling
from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config, Shape, positive, require
from services.core.modeling.families.decoder import RmsNorm
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.packed import pinned, segments
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.layers.tower import CHANNELS, Function, PatchEmbedding, TowerBlock
from services.core.modeling.types import Feature

_BASE = 10000.0
_EPSILON = 1e-6
_ROWS = 1 << 14
"""Patches whose pixels are normed together, so that no more of them stand in fp32."""

Grid = tuple[int, int, int]
"""Patches of a picture or film in frames, rows and columns."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The numbers of ``vision_config`` that fix the network.

    ``patch`` pixels on a side and ``frames`` of a film make a patch, ``merge`` patches on a side a state, of
    ``out`` numbers. ``window`` states on a side are seen together, by all blocks but those of ``whole``; 0
    lets all see everything. With ``newer`` the network is that of Qwen2.5-VL: RMS norms and gated units.
    """

    width: int
    layers: int
    heads: int
    inner: int
    out: int
    patch: int
    frames: int
    merge: int
    newer: bool
    window: int = 0
    whole: frozenset[int] = frozenset()

    @classmethod
    def read(cls, config: Config, *, newer: bool) -> VisionConfig:
        """Parse ``vision_config``; what it leaves out has the default of transformers' own class.

        CheckpointError for a number that is missing or does not fit, and for what is not served.
        """
        activation = "silu" if newer else "quick_gelu"
        refuse_unless(config, "hidden_act", activation, default=activation)
        for name in ("in_channels", "in_chans"):
            refuse_unless(config, name, CHANNELS, default=CHANNELS)
        width = positive(config, "hidden_size" if newer else "embed_dim", None if newer else 1280)
        inner = (
            positive(config, "intermediate_size", 3420)
            if newer
            else int(width * require({"mlp_ratio": 4, **config}, "mlp_ratio", float))
        )
        parsed = cls(
            width=width,
            layers=positive(config, "depth", 32),
            heads=positive(config, "num_heads", 16),
            inner=inner,
            out=positive(config, "out_hidden_size" if newer else "hidden_size", None),
            patch=positive(config, "patch_size", 14),
            frames=positive(config, "temporal_patch_size", 2),
            merge=positive(config, "spatial_merge_size", 2),
            newer=newer,
        )
        if width % parsed.heads or width // parsed.heads % 4:
            raise CheckpointError(f"config.json: a width of {width} does not make {parsed.heads} heads")
        return parsed._windowed(config) if newer else parsed

    def _windowed(self, config: Config) -> VisionConfig:
        window = positive(config, "window_size", 112) // self.patch // self.merge
        whole = config.get("fullatt_block_indexes", [7, 15, 23, 31])
        if window < 1 or not isinstance(whole, list) or not set(whole) <= set(range(self.layers)):
            raise CheckpointError("config.json: 'window_size' or 'fullatt_block_indexes' not served")
        return replace(self, window=window, whole=frozenset(cast("list[int]", whole)))

    @property
    def multiple(self) -> int:
        """Pixels on a side of what becomes one state: sides of pictures are multiples of it."""
        return self.patch * self.merge

    def grid(self, width: int, height: int) -> Grid:
        """Return the patches of a picture whose sides are multiples."""
        return 1, height // self.patch, width // self.patch

    def states(self, grid: Grid) -> int:
        """Return how many states a picture becomes."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


def vision_shapes(config: VisionConfig, prefix: str) -> dict[str, Shape]:
    """Names and shapes of all tensors of the tower."""
    width, inner, merged = config.width, config.inner, config.width * config.merge**2

    def norm(name: str) -> Mapping[str, Shape]:
        return {f"{name}.weight": (width,)} if config.newer else norm_shapes(name, width)

    shapes: dict[str, Shape] = {
        f"{prefix}patch_embed.proj.weight": (width, CHANNELS, config.frames, config.patch, config.patch),
        **norm(f"{prefix}merger.ln_q"),
        **linear_shapes(f"{prefix}merger.mlp.0", merged, merged),
        **linear_shapes(f"{prefix}merger.mlp.2", config.out, merged),
    }
    for i in range(config.layers):
        name = f"{prefix}blocks.{i}"
        shapes |= {**norm(f"{name}.norm1"), **norm(f"{name}.norm2")}
        shapes |= linear_shapes(f"{name}.attn.qkv", 3 * width, width)
        shapes |= linear_shapes(f"{name}.attn.proj", width, width)
        widening = ("gate_proj", "up_proj") if config.newer else ("fc1",)
        for part in widening:
            shapes |= linear_shapes(f"{name}.mlp.{part}", inner, width)
        shapes |= linear_shapes(f"{name}.mlp.{'down_proj' if config.newer else 'fc2'}", width, inner)
    return shapes


@dataclass(frozen=True, slots=True)
class Pictures:
    """What ``preprocessor_config.json`` says of pixels: values from 0 to 255 less ``mean``, over ``std``."""

    scaling: Scaling
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, said: Config, vision: VisionConfig, *, limits: tuple[int, int] | None = None) -> Pictures:
        """Parse the file; ``limits`` are the least and the most pixels if not those that it says.

        CheckpointError for another way to make patches than ``vision``'s, and for what makes no sense.
        """
        source = "preprocessor_config.json"
        for name, own in (
            ("patch_size", vision.patch),
            ("temporal_patch_size", vision.frames),
            ("merge_size", vision.merge),
        ):
            if said.get(name, own) != own:
                raise CheckpointError(f"{source}: '{name}' is {said[name]!r}, the network has {own}")
        size = cast(Config, said.get("size") or {})
        found = {
            "min_pixels": said.get("min_pixels", size.get("shortest_edge", size.get("min_pixels", 3136))),
            "max_pixels": said.get("max_pixels", size.get("longest_edge", size.get("max_pixels", 1003520))),
        }
        least, most = limits or (
            require(found, "min_pixels", int, source=source),
            require(found, "max_pixels", int, source=source),
        )
        if not vision.multiple**2 <= most or not 0 < least <= most:
            raise CheckpointError(f"{source}: pictures of {least} to {most} pixels")
        return cls(
            Scaling(vision.multiple, least, most), _channels(said, "image_mean"), _channels(said, "image_std")
        )


def patch_rows(pixels: NDArray[np.uint8], patch: int, merge: int) -> torch.Tensor:
    """Lay each patch of ``pixels`` (height, width, 3) out as a row, by channel, row and column; uint8.

    Patches that become one state are neighbours.
    """
    height, width = (side // patch // merge for side in pixels.shape[:2])
    cut = torch.from_numpy(pixels).view(height, merge, patch, width, merge, patch, CHANNELS)
    return cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, CHANNELS * patch * patch)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the patches of a pass stand.

    ``places`` (patches, 2) is the row and column of each, in the order of the tower; ``order`` (states,) is
    where each state of that order belongs, None where it is there already. ``wholes`` and ``windows`` are
    the patches of each frame and of each window.
    """

    places: NDArray[np.int64]
    order: NDArray[np.int64] | None
    wholes: NDArray[np.int64]
    windows: NDArray[np.int64]

    @classmethod
    def of(cls, grids: Sequence[Grid], merge: int, window: int) -> Layout:
        """Lay pictures of these ``grids`` out behind one another, each in windows of ``window`` states."""
        frames, rows, columns = np.array(grids, np.int64).T
        rows, columns = np.repeat(rows // merge, frames), np.repeat(columns // merge, frames)
        counts = rows * columns
        frame = np.repeat(np.arange(len(counts)), counts)
        at = np.arange(len(frame)) - np.repeat(np.cumsum(counts) - counts, counts)
        row, column = at // columns[frame], at % columns[frame]
        order, windows = None, counts
        if window:
            down, across = row // window, column // window
            order = np.lexsort((column, row, across, down, frame))
            row, column = row[order], column[order]
            keys = np.stack([frame, down, across])[:, order]
            starts = np.flatnonzero(np.r_[True, (np.diff(keys) != 0).any(0)])
            windows = np.diff(np.r_[starts, len(row)])
        inside = np.indices((merge, merge)).reshape(2, -1).T
        places = np.stack([row, column], 1)[:, None] * merge + inside
        return cls(places.reshape(-1, 2), order, counts * merge**2, windows * merge**2)


class Vision:
    """The network."""

    def __init__(self, layers: Layers, config: VisionConfig, prefix: str, pictures: Pictures) -> None:
        """Read the weights."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, _EPSILON)
        self.config = config
        self._device = layers.device
        # The frames of a picture are the same, and so one product with the sum of their weights.
        patches = layers.checkpoint.tensor(f"{prefix}patch_embed.proj.weight", torch.float32).sum(2)
        product = layers.joined(patches.flatten(1), None)
        self._patches = PatchEmbedding(
            product, pictures.mean, pictures.std, _ROWS, layers.device, layers.dtype
        )
        self._blocks = [_block(layers, config, f"{prefix}blocks.{i}") for i in range(config.layers)]
        self._norm = _norm(layers, config, f"{prefix}merger.ln_q")
        self._merge = layers.linear(f"{prefix}merger.mlp.0"), layers.linear(f"{prefix}merger.mlp.2")

    def __call__(self, pictures: Sequence[Feature]) -> torch.Tensor:
        """From ``patch_rows`` of ``pictures`` to their states behind one another, (states, out)."""
        config = self.config
        layout = Layout.of([cast(Grid, each.grid) for each in pictures], config.merge, config.window)
        rows = torch.cat([each.data for each in pictures])
        order = None if layout.order is None else torch.from_numpy(layout.order).to(self._device)
        if self._device.type == "cuda":
            rows = pinned(rows).to(self._device, non_blocking=True)
        x = self._patches(rows)
        if order is not None:
            x = x.view(-1, config.merge**2 * config.width)[order].view(-1, config.width)
        turns = self._turns(layout)
        wholes = segments(layout.wholes, self._device)
        windows = segments(layout.windows, self._device) if config.window else wholes
        for i, block in enumerate(self._blocks):
            x = block(x, wholes if i in config.whole else windows, turns)
        states = self._merged(x)
        if order is None:
            return states
        ordered = torch.empty_like(states)
        ordered[order] = states
        return ordered

    def _turns(self, layout: Layout) -> Rotation:
        half = self.config.width // self.config.heads // 2
        sides = torch.arange(int(layout.places.max()) + 1, device=self._device)
        return Rotation(sides, half, _BASE).beside(torch.from_numpy(layout.places).to(self._device))

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self._merge
        return second(first.gelu(self._norm(x).view(-1, self.config.merge**2 * self.config.width)))


def _block(layers: Layers, config: VisionConfig, name: str) -> TowerBlock:
    """Read block ``name``."""
    if config.newer:
        inner: Function = _Gated(layers.linear(f"{name}.mlp.gate_proj"), layers.linear(f"{name}.mlp.up_proj"))
        down = layers.linear(f"{name}.mlp.down_proj")
    else:
        inner, down = _QuickGelu(layers.linear(f"{name}.mlp.fc1")), layers.linear(f"{name}.mlp.fc2")
    return TowerBlock(
        heads=config.heads,
        norm=_norm(layers, config, f"{name}.norm1"),
        query_key_value=layers.linear(f"{name}.attn.qkv"),
        attended=layers.linear(f"{name}.attn.proj"),
        inner_norm=_norm(layers, config, f"{name}.norm2"),
        inner=inner,
        down=down,
    )


@dataclass(frozen=True, slots=True)
class _Gated:
    """``silu(gate x) * (up x)``."""

    gate: Linear
    up: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.up.mul(x, self.gate.silu(x))


@dataclass(frozen=True, slots=True)
class _QuickGelu:
    """``y * sigmoid(1.702 y)`` of ``y = up x``."""

    up: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return y.mul_((y * 1.702).sigmoid_())


def _norm(layers: Layers, config: VisionConfig, name: str) -> Function:
    if config.newer:
        return RmsNorm(layers.tensor(f"{name}.weight"), layers.epsilon)
    return layers.norm(name)


def _channels(said: Config, name: str) -> tuple[float, ...]:
    values = cast("list[Any]", require(said, name, list, source="preprocessor_config.json"))
    if len(values) != CHANNELS or not all(isinstance(value, int | float) for value in values):
        raise CheckpointError(f"preprocessor_config.json: '{name}' must be three numbers")
    return tuple(map(float, values))

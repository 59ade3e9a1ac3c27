"""How jina-vlm looks at a picture: as a whole, made small, and in overlapping crops of it.

Sources: Deitke et al., arXiv 2409.17146 (crops that overlap); jina-vlm, arXiv 2512.04032; the file of the
released checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config

_SOURCE = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest_exact": "nearest-exact"}


class Plan(NamedTuple):
    """What becomes of a picture of one size: scaled to ``resized`` (height, width), cut into ``tiles``.

    ``order`` (words,) says for each word of the picture, in the order of the sequence, which it is of all
    words of all crops. ``rows`` and ``columns`` count the words of the tiles together.
    """

    resized: tuple[int, int]
    tiles: tuple[int, int]
    order: NDArray[np.int64]
    rows: int
    columns: int


@dataclass(frozen=True)
class Tiling:
    """What ``preprocessor_config.json`` says; lengths in pixels, but ``margins``, in patches."""

    side: int
    patch: int
    pool: int
    margins: tuple[int, int]
    max_crops: int
    min_pixels: int
    max_pixels: int
    resizes: bool
    in_float: bool
    mode: str
    antialias: bool
    column_words: bool
    scale: tuple[tuple[float, ...], tuple[float, ...]] | tuple[float, float]

    @classmethod
    def read(cls, config: Config) -> Tiling:
        """Parse the file. CheckpointError for a way of cutting or scaling that is not served."""
        method = str(config.get("cropping_method", "resize")).replace("_", "-")
        if method != "overlap-and-resize":
            raise CheckpointError(
                f"{_SOURCE}: pictures are cut by '{method}', served is 'overlap-and-resize'"
            )
        for name in ("preserve_aspect_ratio", "random_interpolation"):
            if config.get(name, False):
                raise CheckpointError(f"{_SOURCE}: '{name}' is not served")
        mode = str(config.get("interpolation", "bicubic")).lower().replace("-", "_")
        if mode not in _MODES:
            raise CheckpointError(
                f"{_SOURCE}: pictures are scaled by '{mode}', served are {', '.join(_MODES)}"
            )
        side = config.get("base_input_size", 336)
        sides = cast("list[int]", side) if isinstance(side, list) else [side]
        pool = int(config.get("pooling_h", 2))
        patch = int(config.get("patch_size", 14))
        margins = tuple(cast("list[int]", config.get("overlap_margins", [4, 4])))
        if len(set(sides)) != 1 or config.get("pooling_w", 2) != pool or len(margins) != 2:
            raise CheckpointError(f"{_SOURCE}: crops, windows and margins must be alike in both directions")
        words = -(-(sides[0] // patch) // pool)
        if any(config.get(f"token_length_{way}", 12) != words for way in "hw") or any(
            m % pool for m in margins
        ):
            raise CheckpointError(f"{_SOURCE}: windows of {pool} do not make the words of a crop")
        return cls(
            side=sides[0],
            patch=patch,
            pool=pool,
            margins=(margins[0], margins[1]),
            max_crops=int(config.get("max_crops", 6)),
            min_pixels=int(config.get("min_pixels") or 56 * 56),
            max_pixels=int(config.get("max_pixels") or 28 * 28 * 1280),
            resizes=bool(config.get("do_resize", True)),
            in_float=bool(config.get("resize_in_float32", True)),
            mode=_MODES[mode],
            antialias=bool(config.get("antialias", True)),
            column_words=bool(config.get("use_column_tokens", True)),
            scale=_scale(config),
        )

    @property
    def grid(self) -> int:
        """Patches on a side of a crop."""
        return self.side // self.patch

    @property
    def words(self) -> int:
        """Words on a side of a crop."""
        return -(-self.grid // self.pool)

    @property
    def _window(self) -> int:
        """Pixels from one crop to the next."""
        return (self.grid - sum(self.margins)) * self.patch

    def length(self, plan: Plan) -> int:
        """Tokens of a picture in the sequence, those around its words included."""
        more = int(self.column_words)
        return 4 + self.words * (self.words + more) + plan.rows * (plan.columns + more)

    def plan(self, height: int, width: int) -> Plan:
        """Decide for a picture of this size."""
        return _plan(self, height, width)

    def crops(self, pixels: NDArray[np.uint8], plan: Plan) -> torch.Tensor:
        """Cut a picture (height, width, 3): (crops, patches, pixels of a patch) fp32, the whole one first.

        A patch is written by row, column and channel.
        """
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.resizes:
            picture = self._resized(picture, plan.resized)
        margin = sum(self.margins) * self.patch
        rows, columns = plan.tiles
        tiled = self._normed(
            self._resized(picture, (rows * self._window + margin, columns * self._window + margin))
        )
        whole = self._normed(self._resized(picture, (self.side, self.side)))
        cut = [
            tiled[:, y : y + self.side, x : x + self.side]
            for y in range(0, rows * self._window, self._window)
            for x in range(0, columns * self._window, self._window)
        ]
        stacked = torch.stack([whole, *cut])[:, :, : self.grid * self.patch, : self.grid * self.patch]
        patches = stacked.unflatten(3, (self.grid, self.patch)).unflatten(2, (self.grid, self.patch))
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(stacked), self.grid**2, -1)

    def _resized(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Scale (3, height, width) to fp32 from 0 to 1, through 8 bits where the picture has them."""
        eight_bits = picture.dtype == torch.uint8 and not self.in_float
        x = picture.float()
        if picture.dtype == torch.uint8 and self.in_float:
            x = x / 255
        if tuple(x.shape[1:]) != size:
            smooth = self.mode != "nearest-exact"
            x = functional.interpolate(x[None], size, mode=self.mode, antialias=self.antialias and smooth)[0]
        return (x.clamp(0, 255).round() / 255) if eight_bits else x.clamp(0, 1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.scale
        if isinstance(first, tuple):
            mean, std = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (first, second))
            return (x - mean) / std
        return first + x * (cast(float, second) - first)

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """Choose the tiling: that which scales the picture up least, or else down least."""
        margin, most = sum(self.margins) * self.patch, self.max_crops
        pairs = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
        candidates = np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])), np.int32)
        size = np.array([height - margin, width - margin], np.float32)
        with np.errstate(divide="ignore"):
            scale = np.min((candidates * self._window).astype(np.float32) / size, axis=1)
        if np.all(scale < 1):
            chosen = candidates[np.argmax(scale)]
        else:
            chosen = candidates[np.argmin(np.where(scale < 1, np.float32(10e9), scale))]
        return int(chosen[0]), int(chosen[1])

    def smaller(self, height: int, width: int) -> tuple[int, int]:
        """Return the size in whole patches, near the picture's own, that lies within the bounds on pixels."""
        patch, least, most = self.patch, self.min_pixels, self.max_pixels
        rows, columns = round(height / patch) * patch, round(width / patch) * patch
        if rows * columns > most:
            by = math.sqrt((height * width) / most)
            rows, columns = (max(patch, math.floor(side / by / patch) * patch) for side in (height, width))
        elif rows * columns < least:
            by = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(side * by / patch) * patch for side in (height, width))
        return rows, columns


@lru_cache(maxsize=256)
def _plan(tiling: Tiling, height: int, width: int) -> Plan:
    resized = tiling.smaller(height, width) if tiling.resizes else (height, width)
    tiles = tiling.tiles(*resized)
    rows, columns = (_kept(tiling, count) for count in tiles)
    # (tile rows, tile columns, rows of a crop, columns of a crop): whether a word is kept.
    kept = rows[:, None, :, None] & columns[None, :, None, :]
    numbers = np.arange(kept.size).reshape(kept.shape) + tiling.words**2
    read = kept.transpose(0, 2, 1, 3)
    order = np.concatenate([np.arange(tiling.words**2), numbers.transpose(0, 2, 1, 3)[read]])
    return Plan(resized, tiles, order, int(rows.sum()), int(columns.sum()))


def _kept(tiling: Tiling, count: int) -> NDArray[np.bool_]:
    """Return which words each of ``count`` crops in a row keeps, (count, words): margins at borders only."""
    before, behind = tiling.margins
    kept = np.zeros((count, tiling.words), bool)
    for i in range(count):
        first = 0 if i == 0 else before // tiling.pool
        patches = tiling.grid - before - behind + before * (i == 0) + behind * (i == count - 1)
        kept[i, first : first - (-patches // tiling.pool)] = True
    return kept


def _scale(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[float, float]:
    method = str(config.get("normalization_method", "gaussian")).replace("-", "_")
    if method == "minmax":
        # The published reader takes a bound of 0 for none.
        return float(config.get("image_min") or -1.0), float(config.get("image_max") or 1.0)
    if method != "gaussian":
        raise CheckpointError(f"{_SOURCE}: 'normalization_method' is '{method}'")
    return _channels(config, "image_mean", _CLIP_MEAN), _channels(config, "image_std", _CLIP_STD)


def _channels(config: Config, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value: Any = config.get(name) or default
    channels = (value,) * 3 if isinstance(value, float) else tuple(value)
    if len(channels) != 3:
        raise CheckpointError(f"{_SOURCE}: '{name}' must be three numbers")
    return channels

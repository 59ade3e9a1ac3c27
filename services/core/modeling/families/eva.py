"""EVA02: the vision tower of jina-clip, a pre-norm ViT with sub-norms, gated units and rotary positions.

Sources: Fang et al., arXiv 2303.11331; Koukounas et al., arXiv 2405.20204 and 2412.08802; the tensors of the
released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config, Shape, positive, require
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.post_norm import Norm
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.layers.rotary import Rotation

_BASE = 10000.0
_EPSILON = 1e-6
_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class EvaConfig:
    """The numbers of ``vision_config`` that fix the network; images are ``image`` pixels on a side.

    ``positions_to`` is the number of patches on a side that the rotary angles were trained for; those of
    another number are spread over it where ``interpolated``.
    """

    width: int
    layers: int
    heads: int
    inner: int
    image: int
    patch: int
    positions_to: int
    interpolated: bool

    @classmethod
    def read(cls, config: Config) -> EvaConfig:
        """Parse ``vision_config``. CheckpointError for a number that is missing, or what is not served."""
        for name, served in (
            ("naive_swiglu", True),
            ("subln", True),
            ("rope_embeddings", True),
            ("qkv_bias", True),
            ("post_norm", False),
            ("ls_init_value", None),
            ("proj_type", None),
        ):
            refuse_unless(config, name, served, default=served)
        width = positive(config, "width")
        head = positive(config, "head_width")
        if width % head or head % 4:
            raise CheckpointError(f"config.json: a width of {width} does not make heads of {head}")
        if config.get("embed_dim", width) != width:
            raise CheckpointError(
                f"config.json: vectors of {config['embed_dim']!r} need a projection, which is not served"
            )
        return cls(
            width=width,
            layers=positive(config, "layers"),
            heads=width // head,
            inner=int(width * require(config, "mlp_ratio", float)),
            image=positive(config, "image_size"),
            patch=positive(config, "patch_size"),
            positions_to=positive(config, "pt_hw_seq_len"),
            interpolated=require(config, "intp_freq", bool),
        )

    @property
    def grid(self) -> int:
        """Patches on a side; what is left of the image at its right and bottom is not seen."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and the one that is read."""
        return self.grid**2 + 1


def eva_shapes(config: EvaConfig, prefix: str) -> dict[str, Shape]:
    """Names and shapes of all tensors of the tower."""
    width, inner = config.width, config.inner
    shapes: dict[str, Shape] = {
        f"{prefix}cls_token": (1, 1, width),
        f"{prefix}pos_embed": (1, config.tokens, width),
        f"{prefix}patch_embed.proj.weight": (width, _CHANNELS, config.patch, config.patch),
        f"{prefix}patch_embed.proj.bias": (width,),
        **norm_shapes(f"{prefix}norm", width),
    }
    for i in range(config.layers):
        name = f"{prefix}blocks.{i}"
        for part in ("q_proj", "k_proj", "v_proj"):
            shapes |= linear_shapes(f"{name}.attn.{part}", width, width, bias=False)
        shapes |= {f"{name}.attn.q_bias": (width,), f"{name}.attn.v_bias": (width,)}
        shapes |= norm_shapes(f"{name}.attn.inner_attn_ln", width)
        shapes |= linear_shapes(f"{name}.attn.proj", width, width)
        shapes |= linear_shapes(f"{name}.mlp.w1", inner, width) | linear_shapes(
            f"{name}.mlp.w2", inner, width
        )
        shapes |= norm_shapes(f"{name}.mlp.ffn_ln", inner) | linear_shapes(f"{name}.mlp.w3", width, inner)
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
    return shapes


class Eva:
    """The network; images of one size, so that a batch is dense as it is."""

    def __init__(
        self, layers: Layers, config: EvaConfig, prefix: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Read the weights; ``mean`` and ``std`` of each channel, of values from 0 to 1, norm the pixels."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, _EPSILON)
        self.config = config
        self._dtype = layers.dtype
        self._mean = torch.tensor(mean, dtype=torch.float32, device=layers.device)
        self._std = torch.tensor(std, dtype=torch.float32, device=layers.device)
        patches = layers.checkpoint.tensor(f"{prefix}patch_embed.proj.weight").flatten(1)
        self._patches = layers.joined(patches, layers.checkpoint.tensor(f"{prefix}patch_embed.proj.bias"))
        positions = layers.checkpoint.tensor(f"{prefix}pos_embed", torch.float32)[0]
        cls = layers.checkpoint.tensor(f"{prefix}cls_token", torch.float32)[0]
        self._first = layers.place(cls + positions[:1])
        self._positions = layers.place(positions[1:])
        self._rotation = _rotation(config, layers.device)
        self._blocks = [_block(layers, config, f"{prefix}blocks.{i}") for i in range(config.layers)]
        self._norm = layers.norm(f"{prefix}norm")

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """From ``pixels`` (images, side, side, 3) uint8 to the vectors (images, width) fp32."""
        images, tokens = pixels.shape[0], self.config.tokens
        x = torch.empty((images, tokens, self.config.width), dtype=self._dtype, device=self._positions.device)
        x[:, 0] = self._first
        x[:, 1:] = self._patches(self._rows(pixels)).view(images, tokens - 1, -1) + self._positions
        x = x.view(images * tokens, -1)
        turns = self._rotation.repeated(images)
        for block in self._blocks:
            x = block(x, images, turns)
        return self._norm(x.view(images, tokens, -1)[:, 0].contiguous()).float()

    def _rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Norm the pixels and lay each patch out as a row, by channel, row and column."""
        grid, patch = self.config.grid, self.config.patch
        seen = pixels[:, : grid * patch, : grid * patch]
        normed = seen.float().div_(255).sub_(self._mean).div_(self._std).to(self._dtype)
        cut = normed.view(-1, grid, patch, grid, patch, _CHANNELS)
        return cut.permute(0, 1, 3, 5, 2, 4).reshape(-1, _CHANNELS * patch * patch)


@dataclass(frozen=True, slots=True)
class _Block:
    heads: int
    norm: Norm
    query_key_value: Linear
    attended_norm: Norm
    attended: Linear
    gated_norm: Norm
    gate: Linear
    up: Linear
    inner_norm: Norm
    down: Linear

    def __call__(self, x: torch.Tensor, images: int, rotation: Rotation) -> torch.Tensor:
        joined = self.query_key_value(self.norm(x)).view(x.shape[0], 3 * self.heads, -1)
        rotation.rope(joined[:, : 2 * self.heads])
        query, key, value = joined.view(images, -1, 3, self.heads, joined.shape[2]).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = self.attended.add(self.attended_norm(attended), x)
        y = self.gated_norm(x)
        return self.down.add(self.inner_norm(self.up.mul(y, self.gate.silu(y))), x)


def _block(layers: Layers, config: EvaConfig, name: str) -> _Block:
    read = layers.checkpoint.tensor
    order = _halves(config)
    query, key = (read(f"{name}.attn.{part}.weight")[order] for part in ("q_proj", "k_proj"))
    query_bias, value_bias = read(f"{name}.attn.q_bias")[order], read(f"{name}.attn.v_bias")
    return _Block(
        heads=config.heads,
        norm=layers.norm(f"{name}.norm1"),
        query_key_value=layers.joined(
            torch.cat([query, key, read(f"{name}.attn.v_proj.weight")]),
            torch.cat([query_bias, torch.zeros_like(query_bias), value_bias]),
        ),
        attended_norm=layers.norm(f"{name}.attn.inner_attn_ln"),
        attended=layers.linear(f"{name}.attn.proj"),
        gated_norm=layers.norm(f"{name}.norm2"),
        gate=layers.linear(f"{name}.mlp.w1"),
        up=layers.linear(f"{name}.mlp.w2"),
        inner_norm=layers.norm(f"{name}.mlp.ffn_ln"),
        down=layers.linear(f"{name}.mlp.w3"),
    )


def _halves(config: EvaConfig) -> torch.Tensor:
    """The order of the rows of a projection that takes pairs of neighbours to the halves of their head.

    The published network turns neighbours; queries and keys in the same other order meet as before.
    """
    rows = torch.arange(config.width).view(config.heads, -1, 2)
    return rows.transpose(1, 2).flatten()


def _rotation(config: EvaConfig, device: torch.device) -> Rotation:
    """The turns of one image: half a head by the row of the patch, half by its column, none of the first."""
    grid, count = config.grid, config.width // config.heads // 4
    places = torch.arange(grid, dtype=torch.float32)
    if config.interpolated:
        places = places * config.positions_to / grid
    angles = places[:, None] * _BASE ** (-torch.arange(count, dtype=torch.float32) / count)
    rows = angles[:, None].expand(grid, grid, count)
    turns = torch.cat([rows, rows.transpose(0, 1)], dim=2).flatten(0, 1)
    return Rotation.by(torch.cat([torch.zeros(1, 2 * count), turns]).to(device))

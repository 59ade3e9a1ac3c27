"""SigLIP 2 as jina-vlm reads images with it, and the connector that makes its patches words of the decoder.

Sources: Tschannen et al., arXiv 2502.14786; Deitke et al., arXiv 2409.17146 (the connector); jina-vlm, arXiv
2512.04032; the tensors and configuration of the released checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config, Shape, positive, require
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.post_norm import Norm
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes

_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """The numbers of ``vision_config`` that fix tower and connector.

    Crops are ``side`` pixels large in patches of ``patch``. ``read`` are the blocks whose outputs the
    connector takes, ``pool`` the side of a window of patches that becomes one word, ``pool_heads`` the heads
    that weigh it; ``out`` is the width of a word.
    """

    width: int
    layers: int
    heads: int
    inner: int
    side: int
    patch: int
    epsilon: float
    read: tuple[int, ...]
    pool: int
    pool_heads: int
    projected: int
    out: int

    @classmethod
    def parse(cls, config: Config) -> SiglipConfig:
        """Parse ``vision_config``. CheckpointError for a number that does not fit, or what is not served."""
        for name, served in (
            ("n_channels", _CHANNELS),
            ("linear_patch_embedding", True),
            ("patch_embedding_bias", True),
            ("pre_lnorm", False),
            ("use_absolute_positional_embeddings", True),
        ):
            refuse_unless(config, name, served, default=served)
        refuse_unless(config, "use_cls_token", False, default=True)
        refuse_unless(config, "post_lnorm", True, default=False)
        width, layers = positive(config, "hidden_size"), positive(config, "n_layers")
        side = config.get("input_size")
        if not isinstance(side, list) or len(set(cast("list[int]", side))) != 1:
            raise CheckpointError(f"config.json: 'input_size' is {side!r}, this network takes squares")
        block = section(config, "block_config")
        attention, feed = section(block, "attn_config"), section(block, "ffn_config")
        norm = section(block, "lnorm_config")
        refuse_blocks(block)
        refuse_unless(norm, "type", "default", default="default")
        refuse_unless(norm, "bias", True, default=None)
        refuse_unless(feed, "activation_type", "gelu_pytorch_tanh", default="silu")
        refuse_unless(feed, "gated_activation", False, default=True)
        refuse_unless(feed, "bias", True, default=False)
        refuse_attention(attention, output_bias=True)
        heads = _heads(attention, width)
        connector = section(config, "vl_connector_config")
        for name, served in (
            ("padding_embed_type", "pad_and_partial_pad"),
            ("pooling_type", "attention_meanq"),
            ("projector_type", "mlp"),
        ):
            refuse_unless(connector, name, served, default=None)
        pooling, projector = (
            section(connector, "attn_pooling_config"),
            section(connector, "mlp_projector_config"),
        )
        refuse_attention(pooling, output_bias=True)
        refuse_unless(projector, "activation_type", "silu", default="silu")
        refuse_unless(projector, "gated_activation", True, default=True)
        refuse_unless(projector, "bias", False, default=False)
        pool = connector.get("pooling_h", 2)
        refuse_unless(connector, "pooling_w", pool, default=2)
        read = tuple(cast("list[int]", require(config, "vit_layers", list)))
        # The last of the outputs is that of the norm behind all blocks, which is not served.
        blocks = tuple(index if index >= 0 else layers + 1 + index for index in read)
        if not blocks or not all(0 <= index < layers for index in blocks):
            raise CheckpointError(f"config.json: 'vit_layers' is {list(read)}, of {layers} blocks")
        return cls(
            width=width,
            layers=layers,
            heads=heads,
            inner=inner_size(feed, width),
            side=cast("list[int]", side)[0],
            patch=positive(config, "patch_size"),
            epsilon=float(norm.get("eps") or 1e-5),
            read=blocks,
            pool=pool,
            pool_heads=_heads(pooling, width),
            projected=inner_size(projector, width),
            out=positive(config, "output_size"),
        )

    @property
    def grid(self) -> int:
        """Patches on a side of a crop."""
        return self.side // self.patch

    @property
    def words(self) -> int:
        """Words on a side of a crop; the last window is filled up with zeros."""
        return -(-self.grid // self.pool)


def siglip_shapes(config: SiglipConfig, prefix: str) -> dict[str, Shape]:
    """Names and shapes of all tensors of tower and connector, those that are not read included."""
    width, inner = config.width, config.inner
    joined = width * len(config.read)
    shapes: dict[str, Shape] = {
        f"{prefix}pos_embed": (config.grid**2, width),
        **linear_shapes(f"{prefix}patch_embed.proj", width, _CHANNELS * config.patch**2),
        **norm_shapes(f"{prefix}post_lnorm", width),
    }
    for i in range(config.layers):
        name = f"{prefix}layers.{i}"
        shapes |= norm_shapes(f"{name}.attn_lnorm", width) | norm_shapes(f"{name}.ffn_lnorm", width)
        shapes |= linear_shapes(f"{name}.attn.qkv_w", 3 * width, width, bias=False)
        shapes |= {f"{name}.attn.{part}_b": (width,) for part in "qkv"}
        shapes |= linear_shapes(f"{name}.attn.out", width, width)
        shapes |= linear_shapes(f"{name}.ffn.up", inner, width) | linear_shapes(
            f"{name}.ffn.down", width, inner
        )
    name = f"{prefix}vl_connector"
    shapes |= {f"{name}.pad_embed": (2, joined)}
    shapes |= linear_shapes(f"{name}.pooling.q_w", width, joined, bias=False)
    shapes |= linear_shapes(f"{name}.pooling.kv_w", 2 * width, joined, bias=False)
    shapes |= {f"{name}.pooling.{part}_b": (width,) for part in "qkv"}
    shapes |= linear_shapes(f"{name}.pooling.out", width, width)
    shapes |= linear_shapes(f"{name}.projector.up", 2 * config.projected, width, bias=False)
    return shapes | linear_shapes(f"{name}.projector.down", config.out, config.projected, bias=False)


class Siglip:
    """Tower and connector. Blocks behind the last that is read are not in memory."""

    def __init__(self, layers: Layers, config: SiglipConfig, prefix: str) -> None:
        """Read the weights."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, config.epsilon)
        self.config = config
        self._dtype, self._device = layers.dtype, layers.device
        self._patches = layers.linear(f"{prefix}patch_embed.proj")
        self._positions = layers.tensor(f"{prefix}pos_embed")
        count = max(config.read) + 1
        self._blocks = [_Block.read(layers, config.heads, f"{prefix}layers.{i}") for i in range(count)]
        self._connector = _Connector(layers, config, f"{prefix}vl_connector")

    def __call__(self, crops: torch.Tensor, last: Sequence[bool]) -> torch.Tensor:
        """From ``crops`` (crops, patches, pixels) to words, (crops, words of a crop, out).

        ``last`` says which crop is the last of its picture: the published network marks that one.
        """
        config = self.config
        count, patches = crops.shape[:2]
        x = self._patches(crops.to(self._device, self._dtype).flatten(0, 1))
        x = (x.view(count, patches, -1) + self._positions).view(count * patches, -1)
        read: dict[int, torch.Tensor] = {}
        for index, block in enumerate(self._blocks):
            x = block(x, count)
            if index in config.read:
                read[index] = x
        joined = torch.cat([read[index] for index in config.read], dim=-1).view(count, patches, -1)
        # A crop that is black all over is taken for none.
        shown = (crops != -1).flatten(1).any(1).to(self._device, self._dtype)
        marked = torch.tensor(last, dtype=self._dtype, device=self._device)
        return self._connector(joined * shown[:, None, None], marked)


@dataclass(frozen=True, slots=True)
class _Block:
    heads: int
    norm: Norm
    query_key_value: Linear
    attended: Linear
    inner_norm: Norm
    up: Linear
    down: Linear

    @classmethod
    def read(cls, layers: Layers, heads: int, name: str) -> _Block:
        bias = torch.cat([layers.checkpoint.tensor(f"{name}.attn.{part}_b") for part in "qkv"])
        return cls(
            heads=heads,
            norm=layers.norm(f"{name}.attn_lnorm"),
            query_key_value=layers.joined(layers.checkpoint.tensor(f"{name}.attn.qkv_w.weight"), bias),
            attended=layers.linear(f"{name}.attn.out"),
            inner_norm=layers.norm(f"{name}.ffn_lnorm"),
            up=layers.linear(f"{name}.ffn.up"),
            down=layers.linear(f"{name}.ffn.down"),
        )

    def __call__(self, x: torch.Tensor, crops: int) -> torch.Tensor:
        joined = self.query_key_value(self.norm(x)).view(crops, -1, 3, self.heads, x.shape[1] // self.heads)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = self.attended.add(attended, x)
        inner = functional.gelu(self.up(self.inner_norm(x)), approximate="tanh")
        return self.down.add(inner, x)


class _Connector:
    def __init__(self, layers: Layers, config: SiglipConfig, name: str) -> None:
        read = layers.checkpoint.tensor
        self._config = config
        self._last = layers.tensor(f"{name}.pad_embed")[1]
        self._query = layers.joined(read(f"{name}.pooling.q_w.weight"), read(f"{name}.pooling.q_b"))
        bias = torch.cat([read(f"{name}.pooling.k_b"), read(f"{name}.pooling.v_b")])
        self._key_value = layers.joined(read(f"{name}.pooling.kv_w.weight"), bias)
        self._pooled = layers.linear(f"{name}.pooling.out")
        up, gate = read(f"{name}.projector.up.weight").chunk(2)
        self._up, self._gate = layers.joined(up, None), layers.joined(gate, None)
        self._down = layers.joined(read(f"{name}.projector.down.weight"), None)

    def __call__(self, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """From patches (crops, patches, joined) to words; ``last`` (crops,) is 1 or 0."""
        config = self._config
        grid, words, pool = config.grid, config.words, config.pool
        x = x + self._last * last[:, None, None]
        x = x.unflatten(1, (grid, grid))
        more = words * pool - grid
        x = functional.pad(x, (0, 0, 0, more, 0, more))
        windows = (
            x.view(len(x), words, pool, words, pool, -1).transpose(2, 3).reshape(-1, pool * pool, x.shape[-1])
        )
        query = self._query(windows.mean(1)).view(len(windows), 1, config.pool_heads, -1).transpose(1, 2)
        joined = self._key_value(windows.flatten(0, 1)).view(
            len(windows), pool * pool, 2, config.pool_heads, -1
        )
        key, value = joined.permute(2, 0, 3, 1, 4)
        pooled = scaled_dot_product_attention(query, key, value).reshape(len(windows), -1)
        y = self._pooled(pooled)
        y = self._down(self._up.mul(y, self._gate.silu(y)))
        return y.view(len(x), words * words, -1)


def section(config: Config, name: str) -> Config:
    """Return a part of a configuration. CheckpointError if it is not there."""
    return cast(Config, require(config, name, dict))


def refuse_blocks(block: Config) -> None:
    """CheckpointError for what blocks of jina-vlm may be told to do, and none here does."""
    refuse_unless(block, "postnorm", False, default=False)
    for name in ("attn_lscale_init", "ffn_lscale_init"):
        refuse_unless(block, name, None, default=None)
    refuse_unless(section(block, "ffn_config"), "inner_lnorm", False, default=False)


def refuse_attention(attention: Config, *, output_bias: bool, head_norms: bool = False) -> None:
    """CheckpointError for attention that works otherwise than here."""
    refuse_unless(attention, "o_bias", output_bias, default=False)
    for name in ("q_lnorm", "k_lnorm"):
        refuse_unless(attention, name, head_norms, default=False)
    if head_norms:
        refuse_unless(attention, "qkv_lnorm_on_heads", True, default=False)
    for name, served in (
        ("v_lnorm", False),
        ("inner_lnorm", False),
        ("clip_qkv", None),
        ("softmax_scale", None),
    ):
        refuse_unless(attention, name, served, default=served)
    refuse_unless(attention, "sliding_window", -1, default=-1)


def inner_size(feed: Config, width: int) -> int:
    """Return the inner width of a feed-forward unit."""
    size: Any = feed.get("size") or feed.get("ratio", 4) * width
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"config.json: 'size' is {size!r}")
    return size


def _heads(attention: Config, width: int) -> int:
    heads = positive(attention, "n_heads")
    refuse_unless(attention, "n_kv_heads", heads, default=heads) if attention.get("n_kv_heads") else None
    if width % heads or attention.get("head_dim") not in (None, width // heads):
        raise CheckpointError(f"config.json: {heads} heads do not divide a width of {width}")
    return heads

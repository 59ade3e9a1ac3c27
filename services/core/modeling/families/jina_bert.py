"""JinaBERT: BERT with ALiBi for positions and a gated feed-forward, in its two published block forms.

Sources: Günther et al., arXiv 2310.19923; the released checkpoints of jina-embeddings-v2-base-* and
jina-bert-v2-qk-post-norm (the form of jina-embeddings-v2-base-code). The text tower of jina-clip-v1 is the
standard form under the names of the "flash" implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config, Shape
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_unless
from services.core.modeling.layers.attention import alibi_slopes, attention
from services.core.modeling.layers.linear import GatedUnit, Linear
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.post_norm import Dense, LayerWeights, Norm, NormWeights, PostNormWeights
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.native import encoder as native
from services.core.modeling.types import Backbone

POOLER = ("pooler.*", "cls.*")
"""Tensors that vectors do not need."""


def is_jina_bert(config: Config) -> bool:
    """Whether config.json is that of a JinaBERT; ``model_type`` says bert and means nothing."""
    return config.get("position_embedding_type") == "alibi"


def read_config(config: Config) -> EncoderConfig:
    """Parse config.json. CheckpointError for anything that JinaBERT does not do."""
    refuse_unless(config, "position_embedding_type", "alibi", default=None)
    refuse_unless(config, "feed_forward_type", "geglu", default=None)
    refuse_unless(config, "hidden_act", "gelu", default="gelu")
    return EncoderConfig.read(config)


def load_jina_bert(
    checkpoint: Checkpoint,
    config: EncoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    extra: Mapping[str, Shape] | None = None,
    unused: Sequence[str] = POOLER,
) -> Backbone:
    """Read the encoder from ``checkpoint``, with or without the ``bert.`` prefix.

    The names of the feed-forward tell the block form. ``extra`` are tensors that the caller will read,
    ``unused`` those that nobody reads. CheckpointError if a tensor is missing, left over or of the wrong
    shape.
    """
    checkpoint.strip_prefix("bert.")
    query_norm = "encoder.layer.0.mlp.up_gated_layer.weight" in checkpoint.names
    names = _query_norm_shapes if query_norm else _standard_shapes
    expected = _embedding_shapes(config)
    for i in range(config.layers):
        expected |= names(config, f"encoder.layer.{i}")
    checkpoint.verify(expected | dict(extra or {}), unused=unused)
    if native.serves(config.width, config.inner, config.heads, config.layers, device, dtype):
        return native.FusedPostNorm(_weights(checkpoint, config, query_norm=query_norm), dtype)
    layers = Layers(checkpoint, device, dtype, config.epsilon)
    make = _query_norm_block if query_norm else _standard_block
    blocks = [make(layers, config, f"encoder.layer.{i}") for i in range(config.layers)]
    return JinaBert(layers, blocks, alibi_slopes(config.heads).to(device))


def _weights(checkpoint: Checkpoint, config: EncoderConfig, *, query_norm: bool) -> PostNormWeights:
    layer = _query_norm_weights if query_norm else _standard_weights
    read = (layer(checkpoint, config, f"encoder.layer.{i}") for i in range(config.layers))
    return _encoder_weights(checkpoint, config, "embeddings.LayerNorm", read)


def _encoder_weights(
    checkpoint: Checkpoint, config: EncoderConfig, norm: str, layers: Iterable[LayerWeights]
) -> PostNormWeights:
    """Join ``layers`` and the embeddings, whose norm is called ``norm``."""
    return PostNormWeights(
        words=checkpoint.tensor("embeddings.word_embeddings.weight"),
        positions=checkpoint.tensor("embeddings.token_type_embeddings.weight")[:1],
        norm=NormWeights.read(checkpoint, norm),
        layers=layers,
        heads=config.heads,
        epsilon=config.epsilon,
        alibi=True,
    )


def _dense(checkpoint: Checkpoint, *names: str) -> Dense:
    weights = [checkpoint.tensor(f"{name}.weight") for name in names]
    biases = [checkpoint.tensor(f"{name}.bias") for name in names]
    return Dense(torch.cat(weights), torch.cat(biases))


def _standard_weights(checkpoint: Checkpoint, config: EncoderConfig, name: str) -> LayerWeights:
    gate, up = checkpoint.tensor(f"{name}.mlp.gated_layers.weight").split(config.inner)
    return LayerWeights(
        query_key_value=_dense(
            checkpoint, *(f"{name}.attention.self.{p}" for p in ("query", "key", "value"))
        ),
        attended=_dense(checkpoint, f"{name}.attention.output.dense"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.attention.output.LayerNorm"),
        gate=Dense(gate, None),
        up=Dense(up, None),
        down=_dense(checkpoint, f"{name}.mlp.wo"),
        down_norm=NormWeights.read(checkpoint, f"{name}.mlp.layernorm"),
    )


def _flash_weights(checkpoint: Checkpoint, config: EncoderConfig, name: str) -> LayerWeights:
    gate, up = checkpoint.tensor(f"{name}.mlp.gated_layers.weight").split(config.inner)
    return LayerWeights(
        query_key_value=_dense(checkpoint, f"{name}.mixer.Wqkv"),
        attended=_dense(checkpoint, f"{name}.mixer.out_proj"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.norm1"),
        gate=Dense(gate, None),
        up=Dense(up, None),
        down=_dense(checkpoint, f"{name}.mlp.wo"),
        down_norm=NormWeights.read(checkpoint, f"{name}.norm2"),
    )


def _query_norm_weights(checkpoint: Checkpoint, config: EncoderConfig, name: str) -> LayerWeights:
    # The halves stand the other way round than in the standard block.
    up, gate = checkpoint.tensor(f"{name}.mlp.up_gated_layer.weight").split(config.inner)
    own = f"{name}.attention.self"
    return LayerWeights(
        query_key_value=_dense(checkpoint, *(f"{own}.{p}" for p in ("query", "key", "value"))),
        query_norm=NormWeights.read(checkpoint, f"{own}.layer_norm_q"),
        key_norm=NormWeights.read(checkpoint, f"{own}.layer_norm_k"),
        attended=_dense(checkpoint, f"{name}.attention.output.dense"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.attention.output.LayerNorm"),
        input_norm=NormWeights.read(checkpoint, f"{name}.layer_norm_1"),
        gate=Dense(gate, None),
        up=Dense(up, None),
        down=_dense(checkpoint, f"{name}.mlp.down_layer"),
        down_norm=NormWeights.read(checkpoint, f"{name}.layer_norm_2"),
    )


def flash_shapes(config: EncoderConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of the standard form under the names of the flash implementation."""
    width, inner = config.width, config.inner
    shapes: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocabulary, width),
        "embeddings.token_type_embeddings.weight": (config.token_types, width),
        **norm_shapes("emb_ln", width),
    }
    for i in range(config.layers):
        name = f"encoder.layers.{i}"
        shapes |= linear_shapes(f"{name}.mixer.Wqkv", 3 * width, width)
        shapes |= linear_shapes(f"{name}.mixer.out_proj", width, width)
        shapes |= linear_shapes(f"{name}.mlp.gated_layers", 2 * inner, width, bias=False)
        shapes |= linear_shapes(f"{name}.mlp.wo", width, inner)
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
    return shapes


def read_flash(layers: Layers, config: EncoderConfig) -> Backbone:
    """Read the encoder of ``flash_shapes``, which the checkpoint is known to hold."""
    checkpoint, device, dtype = layers.checkpoint, layers.device, layers.dtype
    if native.serves(config.width, config.inner, config.heads, config.layers, device, dtype):
        read = (_flash_weights(checkpoint, config, f"encoder.layers.{i}") for i in range(config.layers))
        return native.FusedPostNorm(_encoder_weights(checkpoint, config, "emb_ln", read), dtype)
    blocks = [_flash_block(layers, config, f"encoder.layers.{i}") for i in range(config.layers)]
    return JinaBert(layers, blocks, alibi_slopes(config.heads).to(layers.device), norm="emb_ln")


class _Block(Protocol):
    def __call__(self, x: torch.Tensor, batch: PackedBatch, slopes: torch.Tensor) -> torch.Tensor: ...


class JinaBert:
    """The network; no bias table is ever held, attention makes what it needs from the slopes."""

    def __init__(
        self,
        layers: Layers,
        blocks: Sequence[_Block],
        slopes: torch.Tensor,
        *,
        norm: str = "embeddings.LayerNorm",
    ) -> None:
        """Read the embeddings; ``slopes`` (heads,) fp32 are ALiBi's, ``norm`` names the norm of the words."""
        self._words = layers.tensor("embeddings.word_embeddings.weight")
        self._type = layers.tensor("embeddings.token_type_embeddings.weight")[0].clone()
        self._norm = layers.norm(norm)
        self._blocks = blocks
        self._slopes = slopes

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width)."""
        x = self._norm(functional.embedding(batch.token_ids, self._words).add_(self._type))
        for block in self._blocks:
            x = block(x, batch, self._slopes)
        return x


@dataclass(frozen=True, slots=True)
class _Gated:
    """``down(gelu(gate x) * (up x))``."""

    unit: GatedUnit
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.unit(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down.add(self.unit(x), residual)


@dataclass(frozen=True, slots=True)
class _StandardBlock:
    heads: int
    query_key_value: Linear
    attended: Linear
    attended_norm: Norm
    gated: _Gated
    gated_norm: Norm

    def __call__(self, x: torch.Tensor, batch: PackedBatch, slopes: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query_key_value(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        attended = attention(query, key, value, batch, alibi_slopes=slopes).view(x.shape)
        x = self.attended_norm.behind(self.attended, attended, x)
        return self.gated_norm.behind(self.gated, x, x)


@dataclass(frozen=True, slots=True)
class _QueryNormBlock:
    """Query and key are normed over their full width, and the block's input is added a second time."""

    heads: int
    query: Linear
    query_norm: Norm
    key: Linear
    key_norm: Norm
    value: Linear
    attended: Linear
    attended_norm: Norm
    input_norm: Norm
    gated: _Gated
    gated_norm: Norm

    def __call__(self, x: torch.Tensor, batch: PackedBatch, slopes: torch.Tensor) -> torch.Tensor:
        form = (x.shape[0], self.heads, -1)
        query = self.query_norm(self.query(x)).view(form)
        key = self.key_norm(self.key(x)).view(form)
        value = self.value(x).view(form)
        attended = attention(query, key, value, batch, alibi_slopes=slopes).view(x.shape)
        x = self.input_norm(self.attended_norm.behind(self.attended, attended, x).add_(x))
        return self.gated_norm.behind(self.gated, x, x)


def _embedding_shapes(config: EncoderConfig) -> dict[str, Shape]:
    return {
        "embeddings.word_embeddings.weight": (config.vocabulary, config.width),
        "embeddings.token_type_embeddings.weight": (config.token_types, config.width),
        **norm_shapes("embeddings.LayerNorm", config.width),
    }


def _attention_shapes(config: EncoderConfig, name: str) -> dict[str, Shape]:
    width = config.width
    shapes: dict[str, Shape] = {}
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= linear_shapes(f"{name}.attention.{part}", width, width)
    return shapes | norm_shapes(f"{name}.attention.output.LayerNorm", width)


def _standard_shapes(config: EncoderConfig, name: str) -> dict[str, Shape]:
    width, inner = config.width, config.inner
    return {
        **_attention_shapes(config, name),
        **linear_shapes(f"{name}.mlp.gated_layers", 2 * inner, width, bias=False),
        **linear_shapes(f"{name}.mlp.wo", width, inner),
        **norm_shapes(f"{name}.mlp.layernorm", width),
    }


def _query_norm_shapes(config: EncoderConfig, name: str) -> dict[str, Shape]:
    width, inner = config.width, config.inner
    return {
        **_attention_shapes(config, name),
        **norm_shapes(f"{name}.attention.self.layer_norm_q", width),
        **norm_shapes(f"{name}.attention.self.layer_norm_k", width),
        **norm_shapes(f"{name}.layer_norm_1", width),
        **norm_shapes(f"{name}.layer_norm_2", width),
        **linear_shapes(f"{name}.mlp.up_gated_layer", 2 * inner, width, bias=False),
        **linear_shapes(f"{name}.mlp.down_layer", width, inner),
    }


def _standard_block(layers: Layers, config: EncoderConfig, name: str) -> _StandardBlock:
    gate, up = layers.checkpoint.tensor(f"{name}.mlp.gated_layers.weight").split(config.inner)
    return _StandardBlock(
        heads=config.heads,
        query_key_value=layers.linear(*(f"{name}.attention.self.{p}" for p in ("query", "key", "value"))),
        attended=layers.linear(f"{name}.attention.output.dense"),
        attended_norm=layers.norm(f"{name}.attention.output.LayerNorm"),
        gated=_Gated(layers.gated_gelu(gate, up), layers.linear(f"{name}.mlp.wo")),
        gated_norm=layers.norm(f"{name}.mlp.layernorm"),
    )


def _flash_block(layers: Layers, config: EncoderConfig, name: str) -> _StandardBlock:
    gate, up = layers.checkpoint.tensor(f"{name}.mlp.gated_layers.weight").split(config.inner)
    return _StandardBlock(
        heads=config.heads,
        query_key_value=layers.linear(f"{name}.mixer.Wqkv"),
        attended=layers.linear(f"{name}.mixer.out_proj"),
        attended_norm=layers.norm(f"{name}.norm1"),
        gated=_Gated(layers.gated_gelu(gate, up), layers.linear(f"{name}.mlp.wo")),
        gated_norm=layers.norm(f"{name}.norm2"),
    )


def _query_norm_block(layers: Layers, config: EncoderConfig, name: str) -> _QueryNormBlock:
    # The halves stand the other way round than in the standard block.
    up, gate = layers.checkpoint.tensor(f"{name}.mlp.up_gated_layer.weight").split(config.inner)
    own = f"{name}.attention.self"
    return _QueryNormBlock(
        heads=config.heads,
        query=layers.linear(f"{own}.query"),
        query_norm=layers.norm(f"{own}.layer_norm_q"),
        key=layers.linear(f"{own}.key"),
        key_norm=layers.norm(f"{own}.layer_norm_k"),
        value=layers.linear(f"{own}.value"),
        attended=layers.linear(f"{name}.attention.output.dense"),
        attended_norm=layers.norm(f"{name}.attention.output.LayerNorm"),
        input_norm=layers.norm(f"{name}.layer_norm_1"),
        gated=_Gated(layers.gated_gelu(gate, up), layers.linear(f"{name}.mlp.down_layer")),
        gated_norm=layers.norm(f"{name}.layer_norm_2"),
    )

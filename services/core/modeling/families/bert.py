"""BERT as in Devlin et al., arXiv 1810.04805: learned positions, post-norm blocks, erf GELU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config, Shape
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_unless
from services.core.modeling.layers.post_norm import (
    Dense,
    LayerWeights,
    NormWeights,
    PostNorm,
    PostNormWeights,
)
from services.core.modeling.layers.reading import linear_shapes, norm_shapes
from services.core.modeling.native import encoder as native
from services.core.modeling.types import Backbone

UNUSED = ("pooler.*", "cls.*", "embeddings.position_ids")
"""Tensors of BERT checkpoints that sentence vectors do not need."""


def read_config(config: Config) -> EncoderConfig:
    """Parse config.json. CheckpointError for anything that stock BERT does not do."""
    refuse_unless(config, "position_embedding_type", "absolute", default="absolute")
    refuse_unless(config, "hidden_act", "gelu", default="gelu")
    refuse_unless(config, "is_decoder", False, default=False)
    return EncoderConfig.read(config)


def shapes(config: EncoderConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of the network, without a prefix."""
    width, inner = config.width, config.inner
    result: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocabulary, width),
        "embeddings.position_embeddings.weight": (config.positions, width),
        "embeddings.token_type_embeddings.weight": (config.token_types, width),
        **norm_shapes("embeddings.LayerNorm", width),
    }
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            result |= linear_shapes(f"{layer}.attention.self.{name}", width, width)
        result |= linear_shapes(f"{layer}.attention.output.dense", width, width)
        result |= linear_shapes(f"{layer}.intermediate.dense", inner, width)
        result |= linear_shapes(f"{layer}.output.dense", width, inner)
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            result |= norm_shapes(f"{layer}.{norm}", width)
    return result


def load_bert(
    checkpoint: Checkpoint,
    config: EncoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    extra: Mapping[str, Shape] | None = None,
    unused: Sequence[str] = UNUSED,
) -> Backbone:
    """Read the encoder, without its pooler, from ``checkpoint``, with or without the ``bert.`` prefix.

    ``extra`` are tensors that the caller will read, ``unused`` those that nobody reads. CheckpointError if a
    tensor is missing, left over or of the wrong shape.
    """
    checkpoint.strip_prefix("bert.")
    checkpoint.verify(shapes(config) | dict(extra or {}), unused=unused)
    weights = PostNormWeights(
        words=checkpoint.tensor("embeddings.word_embeddings.weight"),
        positions=_positions(checkpoint),
        norm=NormWeights.read(checkpoint, "embeddings.LayerNorm"),
        layers=(_layer(checkpoint, f"encoder.layer.{i}") for i in range(config.layers)),
        heads=config.heads,
        epsilon=config.epsilon,
    )
    return post_norm(weights, config, device, dtype)


def post_norm(
    weights: PostNormWeights, config: EncoderConfig, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """Make a network of ``weights``, of the compiled kernels where they serve it."""
    if native.serves(config.width, config.inner, config.heads, config.layers, device, dtype):
        return native.FusedPostNorm(weights, dtype)
    return PostNorm(weights, device, dtype)


def _positions(checkpoint: Checkpoint) -> torch.Tensor:
    """Positions with the type of a single text already added, summed in fp32."""
    table = checkpoint.tensor("embeddings.position_embeddings.weight", torch.float32)
    types = checkpoint.tensor("embeddings.token_type_embeddings.weight", torch.float32)
    return table + types[0]


def _dense(checkpoint: Checkpoint, *names: str) -> Dense:
    weights = [checkpoint.tensor(f"{name}.weight") for name in names]
    biases = [checkpoint.tensor(f"{name}.bias") for name in names]
    return Dense(torch.cat(weights), torch.cat(biases))


def _layer(checkpoint: Checkpoint, name: str) -> LayerWeights:
    projections = (f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
    return LayerWeights(
        query_key_value=_dense(checkpoint, *projections),
        attended=_dense(checkpoint, f"{name}.attention.output.dense"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.attention.output.LayerNorm"),
        up=_dense(checkpoint, f"{name}.intermediate.dense"),
        down=_dense(checkpoint, f"{name}.output.dense"),
        down_norm=NormWeights.read(checkpoint, f"{name}.output.LayerNorm"),
    )

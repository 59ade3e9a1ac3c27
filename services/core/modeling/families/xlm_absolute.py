"""XLM-RoBERTa with learned positions, in the names of the flash implementation (jina-reranker-v2).

Source: Conneau et al., arXiv 1911.02116, and the tensors of the released checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config, Shape
from services.core.modeling.families.bert import post_norm
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_unless
from services.core.modeling.layers.post_norm import Dense, LayerWeights, NormWeights, PostNormWeights
from services.core.modeling.layers.reading import linear_shapes, norm_shapes
from services.core.modeling.types import Backbone

_OFFSET = 2
"""The first token has position 2: RoBERTa keeps one row for padding and one below it."""


def read_config(config: Config) -> EncoderConfig:
    """Parse config.json; ``positions`` are the tokens a text may have. CheckpointError if it is another's."""
    refuse_unless(config, "position_embedding_type", "absolute", default="absolute")
    refuse_unless(config, "hidden_act", "gelu", default="gelu")
    refuse_unless(config, "pad_token_id", 1, default=1)
    parsed = EncoderConfig.read(config)
    return replace(parsed, positions=parsed.positions - _OFFSET)


def is_reranker(config: Config) -> bool:
    """Whether config.json is that of jina-reranker-v2, which names no ``model_type``."""
    return (
        config.get("architectures") == ["XLMRobertaForSequenceClassification"]
        and config.get("position_embedding_type", "absolute") == "absolute"
    )


def load_xlm_absolute(
    checkpoint: Checkpoint,
    config: EncoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    extra: Mapping[str, Shape],
) -> Backbone:
    """Read the encoder from ``checkpoint``; ``extra`` are tensors that the caller will read.

    CheckpointError if a tensor is missing, left over or of the wrong shape.
    """
    checkpoint.strip_prefix("roberta.")
    checkpoint.verify(_shapes(config) | dict(extra))
    types = checkpoint.tensor("embeddings.token_type_embeddings.weight", torch.float32)
    positions = checkpoint.tensor("embeddings.position_embeddings.weight", torch.float32)
    weights = PostNormWeights(
        words=checkpoint.tensor("embeddings.word_embeddings.weight"),
        positions=positions[_OFFSET:] + types[0],
        norm=NormWeights.read(checkpoint, "emb_ln"),
        layers=(_layer(checkpoint, f"encoder.layers.{i}") for i in range(config.layers)),
        heads=config.heads,
        epsilon=config.epsilon,
    )
    return post_norm(weights, config, device, dtype)


def _dense(checkpoint: Checkpoint, name: str) -> Dense:
    return Dense(checkpoint.tensor(f"{name}.weight"), checkpoint.tensor(f"{name}.bias"))


def _layer(checkpoint: Checkpoint, name: str) -> LayerWeights:
    return LayerWeights(
        query_key_value=_dense(checkpoint, f"{name}.mixer.Wqkv"),
        attended=_dense(checkpoint, f"{name}.mixer.out_proj"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.norm1"),
        up=_dense(checkpoint, f"{name}.mlp.fc1"),
        down=_dense(checkpoint, f"{name}.mlp.fc2"),
        down_norm=NormWeights.read(checkpoint, f"{name}.norm2"),
    )


def _shapes(config: EncoderConfig) -> dict[str, Shape]:
    width, inner = config.width, config.inner
    shapes: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocabulary, width),
        "embeddings.position_embeddings.weight": (config.positions + _OFFSET, width),
        "embeddings.token_type_embeddings.weight": (config.token_types, width),
        **norm_shapes("emb_ln", width),
    }
    for i in range(config.layers):
        name = f"encoder.layers.{i}"
        shapes |= linear_shapes(f"{name}.mixer.Wqkv", 3 * width, width)
        shapes |= linear_shapes(f"{name}.mixer.out_proj", width, width)
        shapes |= linear_shapes(f"{name}.mlp.fc1", inner, width)
        shapes |= linear_shapes(f"{name}.mlp.fc2", width, inner)
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
    return shapes

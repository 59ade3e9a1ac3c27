"""XLM-RoBERTa with rotary positions and, where the checkpoint has them, task adapters.

The network of jina-embeddings-v3 and jina-colbert-v2. Source: Sturua et al., arXiv 2409.10173, and the
tensors of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, Shape, require
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_unless
from services.core.modeling.layers.attention import attention
from services.core.modeling.layers.lora import (
    AdaptedLayers,
    Adapters,
    LoraLinear,
    adapted_embedding_shapes,
    adapted_linear_shapes,
)
from services.core.modeling.layers.merged import Merges
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.post_norm import Dense, LayerWeights, Norm, NormWeights, PostNormWeights
from services.core.modeling.layers.reading import Layers, norm_shapes
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.native import encoder as native
from services.core.modeling.types import Backbone

_MODEL_TYPES = (None, "xlm-roberta")

_BASE = 10000.0
"""Of the angles, where config.json leaves it to the default of the published implementation."""


def is_xlm_rotary(config: Config) -> bool:
    """Whether config.json is that of an XLM-R with rotary positions; published ones name no type."""
    return config.get("position_embedding_type") == "rotary" and config.get("model_type") in _MODEL_TYPES


def has_adapters(config: Config) -> bool:
    """Whether config.json names task adapters."""
    return bool(config.get("lora_adaptations"))


def read_config(config: Config) -> EncoderConfig:
    """Parse config.json. CheckpointError for anything that this network does not do."""
    refuse_unless(config, "position_embedding_type", "rotary", default=None)
    refuse_unless(config, "hidden_act", "gelu", default="gelu")
    parsed = EncoderConfig.read(config)
    if parsed.width // parsed.heads % 2:
        raise CheckpointError("config.json: rotary positions need an even width of a head")
    return parsed


def load_xlm_rotary(
    checkpoint: Checkpoint,
    config: EncoderConfig,
    adapters: Adapters,
    device: torch.device,
    dtype: torch.dtype,
    *,
    extra: Mapping[str, Shape] | None = None,
) -> Backbone:
    """Read the encoder, without its pooler, from ``checkpoint``, with or without the ``roberta.`` prefix.

    ``extra`` are tensors that the caller will read. CheckpointError if a tensor is missing, left over or of
    the wrong shape.
    """
    checkpoint.strip_prefix("roberta.")
    checkpoint.verify(xlm_rotary_shapes(config, adapters) | dict(extra or {}), unused=("pooler.*",))
    base = rotary_base(checkpoint.config)
    return read_xlm_rotary(Layers(checkpoint, device, dtype, config.epsilon), config, adapters, base)


def read_xlm_rotary(layers: Layers, config: EncoderConfig, adapters: Adapters, base: float) -> Backbone:
    """Read the encoder of ``xlm_rotary_shapes``, which the checkpoint is known to hold.

    ``base`` is that of the rotary angles.
    """
    checkpoint, device, dtype = layers.checkpoint, layers.device, layers.dtype
    if native.serves(config.width, config.inner, config.heads, config.layers, device, dtype):
        return native.FusedPostNorm(_weights(checkpoint, config, adapters, base), dtype)
    return XlmRotary(layers, config, adapters, base)


def _weights(
    checkpoint: Checkpoint, config: EncoderConfig, adapters: Adapters, base: float
) -> PostNormWeights:
    words, types = "embeddings.word_embeddings", "embeddings.token_type_embeddings"
    if adapters.merged is None:
        added = adapters.rows(checkpoint, types, 0)
        rows = torch.stack([added.base, *(added.tasks[task] for task in adapters.names)])
    else:
        rows = adapters.table(checkpoint, types)[:1]
    return PostNormWeights(
        words=adapters.table(checkpoint, words),
        positions=rows,
        norm=NormWeights.read(checkpoint, "emb_ln"),
        layers=(_layer(checkpoint, adapters, f"encoder.layers.{i}") for i in range(config.layers)),
        heads=config.heads,
        epsilon=config.epsilon,
        rotary_base=base,
        tasks=adapters.chosen,
        rank=adapters.rank if adapters.chosen else 0,
        word_tasks=adapters.parts(checkpoint, words) if adapters.chosen else {},
    )


def _layer(checkpoint: Checkpoint, adapters: Adapters, name: str) -> LayerWeights:
    def dense(of: str) -> Dense:
        weight = adapters.weight(checkpoint, f"{name}.{of}")
        tasks = adapters.parts(checkpoint, f"{name}.{of}") if adapters.chosen else {}
        return Dense(weight, checkpoint.tensor(f"{name}.{of}.bias"), tasks)

    return LayerWeights(
        query_key_value=dense("mixer.Wqkv"),
        attended=dense("mixer.out_proj"),
        attended_norm=NormWeights.read(checkpoint, f"{name}.norm1"),
        up=dense("mlp.fc1"),
        down=dense("mlp.fc2"),
        down_norm=NormWeights.read(checkpoint, f"{name}.norm2"),
    )


def rotary_base(config: Config) -> float:
    """The base of the angles that config.json gives or leaves to its default."""
    return cast(float, require({"rotary_emb_base": _BASE, **config}, "rotary_emb_base", float))


class XlmRotary:
    """The network."""

    def __init__(self, layers: Layers, config: EncoderConfig, adapters: Adapters, base: float) -> None:
        """Read the weights; ``base`` is that of the rotary angles.

        ``merges`` has the weights that the network rests on, if it does.
        """
        rests = adapters.names and adapters.merged is None
        self.merges = Merges.on(layers.device, adapters.names) if rests else None
        adapted = AdaptedLayers(layers, adapters, self.merges)
        self._head_dim = config.width // config.heads
        self._base = base
        self._words = adapted.embedding("embeddings.word_embeddings")
        self._type = adapted.row("embeddings.token_type_embeddings", 0)
        self._norm = layers.norm("emb_ln")
        self._blocks: Sequence[_Block] = [
            _block(adapted, layers, config, f"encoder.layers.{i}") for i in range(config.layers)
        ]

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width)."""
        rotation = Rotation(batch.positions(), self._head_dim, self._base)
        x = self._words(batch.token_ids, batch.adapter_runs)
        self._type.add_to(x, batch.adapter_runs)
        x = self._norm(x)
        for block in self._blocks:
            x = block(x, batch, rotation)
        return x


@dataclass(frozen=True, slots=True)
class _Block:
    heads: int
    query_key_value: LoraLinear
    attended: LoraLinear
    attended_norm: Norm
    up: LoraLinear
    down: LoraLinear
    down_norm: Norm

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rotation: Rotation) -> torch.Tensor:
        runs = batch.adapter_runs
        joined = self.query_key_value(x, runs).view(x.shape[0], 3 * self.heads, -1)
        rotation.rope(joined[:, : 2 * self.heads])
        query, key, value = joined.chunk(3, dim=1)
        attended = attention(query, key, value, batch).view(x.shape)
        x = self.attended.normed(attended, runs, x, self.attended_norm)
        return self.down.normed(self.up.gelu(x, runs), runs, x, self.down_norm)


def _block(adapted: AdaptedLayers, layers: Layers, config: EncoderConfig, name: str) -> _Block:
    return _Block(
        heads=config.heads,
        query_key_value=adapted.linear(f"{name}.mixer.Wqkv"),
        attended=adapted.linear(f"{name}.mixer.out_proj"),
        attended_norm=layers.norm(f"{name}.norm1"),
        up=adapted.linear(f"{name}.mlp.fc1"),
        down=adapted.linear(f"{name}.mlp.fc2"),
        down_norm=layers.norm(f"{name}.norm2"),
    )


def xlm_rotary_shapes(config: EncoderConfig, adapters: Adapters) -> dict[str, Shape]:
    """Names and shapes of all tensors of the encoder, without prefix."""
    width, inner = config.width, config.inner
    shapes: dict[str, Shape] = {
        **adapted_embedding_shapes("embeddings.word_embeddings", config.vocabulary, width, adapters),
        **adapted_embedding_shapes("embeddings.token_type_embeddings", config.token_types, width, adapters),
        **norm_shapes("emb_ln", width),
    }
    for i in range(config.layers):
        name = f"encoder.layers.{i}"
        shapes |= adapted_linear_shapes(f"{name}.mixer.Wqkv", 3 * width, width, adapters)
        shapes |= adapted_linear_shapes(f"{name}.mixer.out_proj", width, width, adapters)
        shapes |= adapted_linear_shapes(f"{name}.mlp.fc1", inner, width, adapters)
        shapes |= adapted_linear_shapes(f"{name}.mlp.fc2", width, inner, adapters)
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
    return shapes

"""What config.json of any BERT-like encoder says about its size."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, require


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The numbers of config.json that fix the network."""

    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    token_types: int
    epsilon: float

    @classmethod
    def read(cls, config: Config) -> EncoderConfig:
        """Parse config.json. CheckpointError for a number that is missing or does not fit."""
        parsed = cls(
            width=require(config, "hidden_size", int),
            layers=require(config, "num_hidden_layers", int),
            heads=require(config, "num_attention_heads", int),
            inner=require(config, "intermediate_size", int),
            vocabulary=require(config, "vocab_size", int),
            positions=require(config, "max_position_embeddings", int),
            token_types=require(config, "type_vocab_size", int),
            epsilon=require(config, "layer_norm_eps", float),
        )
        if min(parsed.width, parsed.layers, parsed.heads, parsed.inner, parsed.vocabulary) < 1:
            raise CheckpointError("config.json: sizes must be at least 1")
        if parsed.width % parsed.heads:
            raise CheckpointError(
                f"config.json: {parsed.heads} heads do not divide a width of {parsed.width}"
            )
        return parsed


def refuse_unless(config: Config, name: str, wanted: object, *, default: object) -> None:
    """CheckpointError unless ``config[name]``, or ``default`` where it is not given, is ``wanted``."""
    found = config.get(name, default)
    if found != wanted:
        raise CheckpointError(f"config.json: '{name}' is {found!r}, this network has {wanted!r}")


def refuse_short(spec: ModelSpec, config: EncoderConfig, checkpoint: Checkpoint) -> None:
    """CheckpointError if the network takes fewer tokens than the catalogue promises."""
    if spec.max_tokens > config.positions:
        raise CheckpointError(
            f"{checkpoint.directory}: {spec.id} is to take {spec.max_tokens} tokens, "
            f"the network has {config.positions} positions"
        )

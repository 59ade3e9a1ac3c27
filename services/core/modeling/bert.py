"""BERT as in Devlin et al., arXiv 1810.04805: learned positions, post-norm blocks, erf GELU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from services.core.modeling.attention import attention
from services.core.modeling.checkpoint import Checkpoint, CheckpointError, Config, Shape, require
from services.core.modeling.linear import Linear, linear
from services.core.modeling.packed import PackedBatch

UNUSED = ("pooler.*", "cls.*", "embeddings.position_ids")
"""Tensors of BERT checkpoints that sentence vectors do not need."""


@dataclass(frozen=True, slots=True)
class BertConfig:
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
    def read(cls, config: Config) -> BertConfig:
        """Parse config.json. CheckpointError for anything that stock BERT does not do."""
        refuse_unless(config, "position_embedding_type", "absolute", default="absolute")
        refuse_unless(config, "hidden_act", "gelu", default="gelu")
        refuse_unless(config, "is_decoder", False, default=False)
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


def shapes(config: BertConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of the network, without a prefix."""
    width, inner = config.width, config.inner
    result: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocabulary, width),
        "embeddings.position_embeddings.weight": (config.positions, width),
        "embeddings.token_type_embeddings.weight": (config.token_types, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            result |= _linear_shapes(f"{layer}.attention.self.{name}", width, width)
        result |= _linear_shapes(f"{layer}.attention.output.dense", width, width)
        result |= _linear_shapes(f"{layer}.intermediate.dense", inner, width)
        result |= _linear_shapes(f"{layer}.output.dense", width, inner)
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            result |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
    return result


def _linear_shapes(name: str, out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer norm over the last axis; the statistics are fp32 whatever the dtype."""

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``x``, (rows, width)."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, slots=True)
class _Layer:
    heads: int
    qkv: Linear
    attended: Linear
    attended_norm: Norm
    up: Linear
    down: Linear
    down_norm: Norm

    def __call__(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        query, key, value = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        attended = attention(query, key, value, batch).view(x.shape)
        x = self.attended_norm(self.attended.add(attended, x))
        return self.down_norm(self.down.add(self.up.gelu(x), x))


class Bert:
    """The encoder without its pooler."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Read the network from ``checkpoint``, with or without the ``bert.`` prefix.

        CheckpointError if the configuration or a tensor is not BERT's.
        """
        config = BertConfig.read(checkpoint.config)
        checkpoint.strip_prefix("bert.")
        checkpoint.verify(shapes(config), unused=UNUSED)
        self.config = config
        reader = _Reader(checkpoint, device, dtype, config.epsilon)
        self._words = reader.tensor("embeddings.word_embeddings.weight")
        self._positions = reader.positions()
        self._norm = reader.norm("embeddings.LayerNorm")
        self._layers = [reader.layer(f"encoder.layer.{i}", config.heads) for i in range(config.layers)]

    @property
    def width(self) -> int:
        """Length of one hidden state."""
        return self.config.width

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width). ValueError for an item beyond the positions."""
        if batch.max_length > self.config.positions:
            raise ValueError(f"{batch.max_length} tokens, the network has {self.config.positions} positions")
        x = functional.embedding(batch.token_ids, self._words)
        x = self._norm(x.add_(functional.embedding(batch.positions, self._positions)))
        for layer in self._layers:
            x = layer(x, batch)
        return x


class _Reader:
    """Tensors of a verified checkpoint in the form the layers take them."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, epsilon: float
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._epsilon = epsilon

    def tensor(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(name, self._dtype).to(self._device)

    def positions(self) -> torch.Tensor:
        """Positions with the type of a single text already added, summed in fp32."""
        table = self._checkpoint.tensor("embeddings.position_embeddings.weight", torch.float32)
        types = self._checkpoint.tensor("embeddings.token_type_embeddings.weight", torch.float32)
        return (table + types[0]).to(self._dtype).to(self._device)

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), self._epsilon)

    def linear(self, *names: str) -> Linear:
        weight = torch.cat([self._checkpoint.tensor(f"{n}.weight", self._dtype) for n in names])
        bias = torch.cat([self._checkpoint.tensor(f"{n}.bias", self._dtype) for n in names])
        return linear(weight, bias, self._device)

    def layer(self, name: str, heads: int) -> _Layer:
        return _Layer(
            heads=heads,
            qkv=self.linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            attended=self.linear(f"{name}.attention.output.dense"),
            attended_norm=self.norm(f"{name}.attention.output.LayerNorm"),
            up=self.linear(f"{name}.intermediate.dense"),
            down=self.linear(f"{name}.output.dense"),
            down_norm=self.norm(f"{name}.output.LayerNorm"),
        )

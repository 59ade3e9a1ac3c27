"""What config.json of Qwen2, Qwen3 and EuroBERT says about the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, require
from services.core.modeling.families.encoder_config import refuse_unless


@dataclass(frozen=True, slots=True)
class Form:
    """What tells the networks apart."""

    attention_bias: bool = False
    head_norms: bool = False
    causal: bool = True


QWEN2 = Form(attention_bias=True)
QWEN3 = Form(head_norms=True)
EUROBERT = Form(causal=False)


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The numbers of config.json that fix the network.

    ``windows`` has for each layer how many tokens a token sees, itself and those before it; None is all.
    """

    width: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int
    epsilon: float
    rotary_base: float
    windows: tuple[int | None, ...]
    attention_bias: bool
    head_norms: bool
    causal: bool

    @classmethod
    def read(cls, config: Config, form: Form) -> DecoderConfig:
        """Parse config.json. CheckpointError for a number that does not fit and for what is not served."""
        refuse_unless(config, "hidden_act", "silu", default="silu")
        refuse_unless(config, "mlp_bias", False, default=False)
        refuse_unless(config, "attention_bias", form.attention_bias, default=form.attention_bias)
        width = require(config, "hidden_size", int)
        heads = require(config, "num_attention_heads", int)
        layers = require(config, "num_hidden_layers", int)
        parsed = cls(
            width=width,
            layers=layers,
            heads=heads,
            key_heads=_optional(config, "num_key_value_heads", heads),
            head_dim=_optional(config, "head_dim", width // max(1, heads)),
            inner=require(config, "intermediate_size", int),
            vocabulary=require(config, "vocab_size", int),
            positions=require(config, "max_position_embeddings", int),
            epsilon=require(config, "rms_norm_eps", float),
            rotary_base=_rotary_base(config),
            windows=_windows(config, layers) if form.causal else (None,) * layers,
            attention_bias=form.attention_bias,
            head_norms=form.head_norms,
            causal=form.causal,
        )
        parsed._check()
        return parsed

    def _check(self) -> None:
        sizes = (self.width, self.layers, self.heads, self.key_heads, self.head_dim, self.inner)
        if min(*sizes, self.vocabulary, self.positions) < 1:
            raise CheckpointError("config.json: sizes must be at least 1")
        if self.heads % self.key_heads:
            raise CheckpointError(f"config.json: {self.key_heads} key heads do not divide {self.heads} heads")
        if self.head_dim % 2:
            raise CheckpointError("config.json: rotary positions need an even width of a head")

    def refuse_short(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        """CheckpointError if the network takes fewer tokens than the catalogue promises."""
        if spec.max_tokens > self.positions:
            raise CheckpointError(
                f"{checkpoint.directory}: {spec.id} is to take {spec.max_tokens} tokens, "
                f"the network has {self.positions} positions"
            )


def _optional(config: Config, name: str, default: int) -> int:
    return default if config.get(name) is None else require(config, name, int)


def _rotary_base(config: Config) -> float:
    """Read the base of the angles, in the older or the newer spelling; only plain angles are served."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rotary positions of the kind {kind!r} are not served")
    base = require(scaling if "rope_theta" in scaling else config, "rope_theta", float)
    if base <= 0:
        raise CheckpointError(f"config.json: 'rope_theta' must be positive, found {base}")
    return base


def _windows(config: Config, layers: int) -> tuple[int | None, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        first = require(config, "max_window_layers", int) if config.get("use_sliding_window") else layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = {"full_attention", "sliding_attention"}
    if not isinstance(kinds, list) or len(cast("list[Any]", kinds)) != layers or not known.issuperset(kinds):
        raise CheckpointError(
            f"config.json: 'layer_types' must name {layers} layers, each of {sorted(known)}"
        )
    if "sliding_attention" not in kinds:
        return (None,) * layers
    window = require(config, "sliding_window", int)
    if window < 1:
        raise CheckpointError(f"config.json: 'sliding_window' must be at least 1, found {window}")
    return tuple(window if kind == "sliding_attention" else None for kind in cast("list[str]", kinds))

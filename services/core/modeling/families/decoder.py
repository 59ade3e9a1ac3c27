"""The network of Qwen2, Qwen3 and EuroBERT: one block, told apart by a few switches.

RMS norms before attention and feed-forward, rotary positions, key heads shared by several query heads, a
gated SiLU. Qwen2 has biases on query, key and value; Qwen3 norms each head of query and key; EuroBERT has
neither and sees both directions. Everything between two attentions goes row by row, so a long text passes
through it in parts that fit the cache, and memory grows with the length only by a few rows of numbers.
Sources: Qwen2 arXiv 2407.10671, Qwen3 arXiv 2505.09388, EuroBERT arXiv 2503.05500.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import Checkpoint, Shape
from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.cuda import ops as cuda
from services.core.modeling.families.decoder_config import DecoderConfig
from services.core.modeling.layers.lora import LoraLinear, Runs, lora_linear
from services.core.modeling.layers.merged import Merges
from services.core.modeling.layers.packed import AdapterRun, PackedBatch
from services.core.modeling.layers.reading import Layers
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.layers.sliding import sliding_attention
from services.core.modeling.native import decoder as native
from services.core.modeling.native.decoder import FusedDecoder
from services.core.modeling.types import Backbone

_CPU_ROWS = 512
_CUDA_ROWS = 1 << 16
"""Rows that go through the layers between two attentions together."""

UNUSED = ("lm_head.*",)
"""Tensors that a checkpoint of a language model may have beside the network."""


def decoder_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors, without a prefix."""
    shapes: dict[str, Shape] = {
        "embed_tokens.weight": (config.vocabulary, config.width),
        "norm.weight": (config.width,),
    }
    for i in range(config.layers):
        name = f"layers.{i}"
        shapes[f"{name}.input_layernorm.weight"] = (config.width,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (config.width,)
        if config.head_norms:
            shapes[f"{name}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{name}.self_attn.k_norm.weight"] = (config.head_dim,)
    for name, (out, into) in linear_sizes(config).items():
        shapes[f"{name}.weight"] = (out, into)
        if config.attention_bias and name.endswith((".q_proj", ".k_proj", ".v_proj")):
            shapes[f"{name}.bias"] = (out,)
    return shapes


def linear_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Names and (out, in) of all linear layers: what a task adapter may change."""
    width, queries, keys = config.width, config.heads * config.head_dim, config.key_heads * config.head_dim
    sizes: dict[str, tuple[int, int]] = {}
    for i in range(config.layers):
        name = f"layers.{i}"
        sizes |= {
            f"{name}.self_attn.q_proj": (queries, width),
            f"{name}.self_attn.k_proj": (keys, width),
            f"{name}.self_attn.v_proj": (keys, width),
            f"{name}.self_attn.o_proj": (width, queries),
            f"{name}.mlp.gate_proj": (config.inner, width),
            f"{name}.mlp.up_proj": (config.inner, width),
            f"{name}.mlp.down_proj": (width, config.inner),
        }
    return sizes


def load_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapters: PeftAdapters | None = None,
    extra: Mapping[str, Shape] | None = None,
    unused: Sequence[str] = (),
) -> Backbone:
    """Read the network from ``checkpoint``, with or without the ``model.`` prefix.

    ``extra`` are tensors that the caller will read, ``unused`` patterns of those that nobody does.
    CheckpointError if a tensor is missing, left over or of
    the wrong shape.
    """
    checkpoint.strip_prefix("model.")
    checkpoint.verify(decoder_shapes(config) | dict(extra or {}), unused=(*UNUSED, *unused))
    layers = Layers(checkpoint, device, dtype, config.epsilon)
    network = FusedDecoder if native.serves(config, device, dtype) else Decoder
    return network(layers, config, adapters or PeftAdapters())


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``x``, (..., width)."""
        if cuda.serves(x):
            return cuda.rms_norm(x, self.weight, self.epsilon)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring rows, their turns and their adapters, as places in the part."""

    rows: slice
    rotation: Rotation
    runs: Runs


class Decoder:
    """The network."""

    def __init__(self, layers: Layers, config: DecoderConfig, adapters: PeftAdapters) -> None:
        """Read the weights; ``merges`` has what the network rests on, if anything."""
        self.merges = Merges.on(layers.device, sorted(adapters.names)) if adapters.names else None
        self._config = config
        self._rows = _CPU_ROWS if layers.device.type == "cpu" else _CUDA_ROWS
        self._words = layers.tensor("embed_tokens.weight")
        self._blocks = [_Block.read(layers, config, adapters, self.merges, i) for i in range(config.layers)]
        self._norm = RmsNorm(layers.tensor("norm.weight"), config.epsilon)

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width)."""
        parts = self._parts(batch)
        x = functional.embedding(batch.token_ids, self._words)
        if batch.inserted is not None:
            x[batch.inserted.places] = batch.inserted.states.to(x.dtype)
        *blocks, last = self._blocks
        for block in blocks:
            x = block(x, batch, parts)
        if batch.wanted is None:
            x = last(x, batch, parts)
            return _by_rows(parts, lambda part: self._norm(x[part.rows]))
        attended = last.attend(x, batch, parts)
        rows = torch.from_numpy(batch.wanted).long() if batch.wanted_rows is None else batch.wanted_rows
        x[rows] = self._norm(last.feed(x[rows], attended[rows], batch.wanted_runs))
        return x

    def _parts(self, batch: PackedBatch) -> list[_Part]:
        config, turns = self._config, batch.rotation
        positions = batch.positions()
        parts: list[_Part] = []
        for start in range(0, batch.tokens, self._rows):
            rows = slice(start, min(start + self._rows, batch.tokens))
            if turns is None:
                rotation = Rotation(positions[rows], config.head_dim, config.rotary_base)
            else:
                rotation = turns.rows(rows)
            parts.append(_Part(rows, rotation, _clipped(batch.adapter_runs, rows)))
        return parts


class _Gated(Protocol):
    """``silu(gate x) * (up x)``."""

    def __call__(self, x: torch.Tensor, runs: Runs) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _JoinedGate:
    """One product, with the gating behind it."""

    joined: LoraLinear

    def __call__(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        return self.joined.gated(x, runs)


@dataclass(frozen=True, slots=True)
class _TwoProducts:
    """In two products where no adapter comes between."""

    gate: LoraLinear
    up: LoraLinear

    def __call__(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        if self.gate.plain(runs) and self.up.plain(runs):
            return self.up.base.mul(x, self.gate.base.silu(x))
        return functional.silu(self.gate(x, runs), inplace=True).mul_(self.up(x, runs))


@dataclass(frozen=True, slots=True)
class _Block:
    config: DecoderConfig
    window: int | None
    attention_norm: RmsNorm
    query_key_value: LoraLinear
    head_norms: tuple[RmsNorm, RmsNorm] | None
    attended: LoraLinear
    inner_norm: RmsNorm
    gated: _Gated
    down: LoraLinear

    @classmethod
    def read(
        cls,
        layers: Layers,
        config: DecoderConfig,
        adapters: PeftAdapters,
        merges: Merges | None,
        index: int,
    ) -> _Block:
        """Read block ``index``."""
        name = f"layers.{index}"

        def norm(of: str) -> RmsNorm:
            return RmsNorm(layers.tensor(f"{name}.{of}.weight"), config.epsilon)

        def linear(*of: str, bias: bool = False) -> LoraLinear:
            return lora_linear(layers, adapters, [f"{name}.{each}" for each in of], bias=bias, merges=merges)

        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return cls(
            config=config,
            window=config.windows[index],
            attention_norm=norm("input_layernorm"),
            query_key_value=linear(*attention, bias=config.attention_bias),
            head_norms=(norm("self_attn.q_norm"), norm("self_attn.k_norm")) if config.head_norms else None,
            attended=linear("self_attn.o_proj"),
            inner_norm=norm("post_attention_layernorm"),
            gated=_JoinedGate(linear("mlp.gate_proj", "mlp.up_proj"))
            if cuda.serves_device(layers.device)
            else _TwoProducts(linear("mlp.gate_proj"), linear("mlp.up_proj")),
            down=linear("mlp.down_proj"),
        )

    def __call__(self, x: torch.Tensor, batch: PackedBatch, parts: Sequence[_Part]) -> torch.Tensor:
        """Return the states behind the block, (tokens, width)."""
        attended = self.attend(x, batch, parts)
        return _by_rows(parts, lambda part: self.feed(x[part.rows], attended[part.rows], part.runs))

    def attend(self, x: torch.Tensor, batch: PackedBatch, parts: Sequence[_Part]) -> torch.Tensor:
        """Return what each token gathers from the others, (tokens, heads * head_dim)."""
        heads, key_heads = self.config.heads, self.config.key_heads
        joined = _by_rows(parts, lambda part: self._project(x[part.rows], part))
        query, key, value = joined.split((heads, key_heads, key_heads), dim=1)
        causal = self.config.causal
        return sliding_attention(query, key, value, batch, causal=causal, window=self.window).flatten(1)

    def _project(self, x: torch.Tensor, part: _Part) -> torch.Tensor:
        """Return query, key and value with their positions, (rows, heads + 2 key heads, head_dim)."""
        joined = self.query_key_value(self.attention_norm(x), part.runs)
        joined = joined.view(x.shape[0], -1, self.config.head_dim)
        turning = self.config.heads + self.config.key_heads
        if cuda.serves(joined):
            self._turn(joined, part.rotation)
            return joined
        if self.head_norms is not None:
            query, key = joined[:, :turning].split((self.config.heads, self.config.key_heads), dim=1)
            query.copy_(self.head_norms[0](query))
            key.copy_(self.head_norms[1](key))
        part.rotation.rope(joined[:, :turning])
        return joined

    def _turn(self, joined: torch.Tensor, rotation: Rotation) -> None:
        """Norm and turn the heads of query and key in one kernel."""
        norms = None if self.head_norms is None else (self.head_norms[0].weight, self.head_norms[1].weight)
        cuda.norm_rope(
            joined,
            rotation.cosines,
            rotation.sines,
            self.config.heads,
            self.config.key_heads,
            norms,
            self.config.epsilon,
        )

    def feed(self, x: torch.Tensor, attended: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return what becomes of rows of states, maybe in their memory, and of what they gathered."""
        x = self.attended.add_to(x, attended, runs)
        return self.down.add_to(x, self.gated(self.inner_norm(x), runs), runs)


def _by_rows(parts: Sequence[_Part], work: Callable[[_Part], torch.Tensor]) -> torch.Tensor:
    """Apply ``work`` to each part and put the results below one another."""
    first = work(parts[0])
    if len(parts) == 1:
        return first
    whole = torch.empty(parts[-1].rows.stop, *first.shape[1:], dtype=first.dtype, device=first.device)
    whole[parts[0].rows] = first
    del first
    for part in parts[1:]:
        whole[part.rows] = work(part)
    return whole


def _clipped(runs: Sequence[AdapterRun], rows: slice) -> Runs:
    """Return what of ``runs`` lies in ``rows``, counted from there."""
    return tuple(run.clipped(rows) for run in runs if run.start < rows.stop and run.end > rows.start)

"""A whole decoder, task adapters included, in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.modeling.checkpoints.peft import LowRank, PeftAdapters
from services.core.modeling.families.decoder_config import DecoderConfig
from services.core.modeling.layers.packed import AdapterRun, PackedBatch
from services.core.modeling.layers.reading import Layers
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.native.instructions import current
from services.core.modeling.native.library import library, scratch

_POINTER = ctypes.c_void_p
_MOST_LAYERS = 127  # two phases each, see MOST_PHASES in team.h
_KEPT_POSITIONS = 8192
"""Positions whose angles are kept between calls; those of a longer text are made for it."""


class _LowRank(ctypes.Structure):
    _fields_ = (("down", _POINTER), ("up", _POINTER))


class _Projection(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("tasks", _POINTER),
        ("into", ctypes.c_int64),
        ("out", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("query", "key", "value", "attended", "gate", "up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "inner_norm", "query_norm", "key_norm")),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """``struct decoder`` of decoder.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("width", "heads", "key_heads", "head_dim", "inner", "layers", "rank", "causal")
        ),
        ("epsilon", ctypes.c_float),
        ("words", _POINTER),
        ("norm", _POINTER),
        ("layer", _POINTER),
    )


class _Pass(ctypes.Structure):
    """``struct text_pass`` of decoder.h."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in (
                *("decoder", "ids", "positions", "ends", "wanted"),
                *("cosines", "sines", "runs", "wanted_runs"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("items", "longest", "tokens", "wanted_count")),
        *((name, _POINTER) for name in ("hidden", "joined", "attended")),
    )


def serves(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run a network of this form faster than torch."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and all(size % 2 == 0 for size in (config.width, config.inner, config.head_dim))
        and not current().passes_on_torch
        and config.layers <= _MOST_LAYERS
        and library() is not None
    )


@dataclass(frozen=True, slots=True)
class _Angles:
    """Cosines and sines of the positions from 0, (positions, head_dim / 2) fp32."""

    cosines: torch.Tensor
    sines: torch.Tensor


class FusedDecoder:
    """The network of ``decoder.Decoder`` in bf16 with fp32 sums, norms and softmax."""

    def __init__(self, layers: Layers, config: DecoderConfig, adapters: PeftAdapters) -> None:
        """Read the weights and lay them out for the kernels; ``serves`` must have said yes."""
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        self._config = config
        self._tasks = {task: i for i, task in enumerate(sorted(adapters.names))}
        self._angles = _angles(0, config)
        reader = _Reader(kernels, layers, config, adapters)
        self._kept = reader.kept
        blocks = [reader.layer(i) for i in range(config.layers)]
        self._layers = (_Layer * len(blocks))(*blocks)
        self._decoder = _Decoder(
            *(config.width, config.heads, config.key_heads, config.head_dim, config.inner, config.layers),
            reader.rank,
            config.causal,
            config.epsilon,
            reader.keep(layers.tensor("embed_tokens.weight")),
            reader.norm("norm"),
            ctypes.addressof(self._layers),
        )

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width) bf16; see ``Backbone``.

        Up to ``torch.get_num_threads()`` threads of the calling thread's setting work on it.
        """
        config, threads = self._config, torch.get_num_threads()
        tokens, longest = batch.tokens, batch.max_length
        positions, angles = batch.positions(), self._angles_of(longest)
        runs, wanted_runs = self._runs(batch.adapter_runs), self._runs(batch.wanted_runs)
        wanted = batch.wanted
        heads = config.heads + 2 * config.key_heads
        hidden = torch.empty(tokens, config.width, dtype=torch.bfloat16)
        joined = torch.empty(tokens, heads * config.head_dim, dtype=torch.bfloat16)
        attended = torch.empty(tokens, config.heads * config.head_dim, dtype=torch.bfloat16)
        decoder = ctypes.addressof(self._decoder)
        given = _Pass(
            *(decoder, batch.token_ids.data_ptr(), positions.data_ptr(), batch.cu_lengths.data_ptr()),
            None if wanted is None else wanted.ctypes.data,
            *(angles.cosines.data_ptr(), angles.sines.data_ptr(), runs.ctypes.data, wanted_runs.ctypes.data),
            *(len(batch.lengths), longest, tokens, tokens if wanted is None else len(wanted)),
            *(hidden.data_ptr(), joined.data_ptr(), attended.data_ptr()),
        )
        own = scratch(self._kernels.sf_decoder_scratch(decoder, threads))
        self._kernels.sf_decode(ctypes.addressof(given), own, threads)
        return hidden

    def _angles_of(self, longest: int) -> _Angles:
        """Angles of at least ``longest`` positions. Another thread may make the same ones meanwhile."""
        angles = self._angles
        if len(angles.cosines) < longest:
            angles = _angles(max(longest, 2 * len(angles.cosines)), self._config)
            if longest <= _KEPT_POSITIONS:
                self._angles = angles
        return angles

    def _runs(self, runs: Sequence[AdapterRun]) -> NDArray[np.int32]:
        """Return (runs + 1, 3): start, end and task of each, and one that lies behind all rows."""
        end = np.iinfo(np.int32).max
        rows = [(run.start, run.end, -1 if run.adapter is None else self._tasks[run.adapter]) for run in runs]
        return np.array([*rows, (end, end, -1)], np.int32)


def _angles(positions: int, config: DecoderConfig) -> _Angles:
    turn = Rotation(torch.arange(positions, dtype=torch.int32), config.head_dim, config.rotary_base)
    return _Angles(turn.cosines.contiguous(), turn.sines.contiguous())


class _Reader:
    """Lays weights out for the kernels and keeps what it made."""

    def __init__(
        self, kernels: ctypes.CDLL, layers: Layers, config: DecoderConfig, adapters: PeftAdapters
    ) -> None:
        self._kernels = kernels
        self._layers = layers
        self._config = config
        self._adapters = adapters
        self.rank = adapters.rank + adapters.rank % 2
        self.kept: list[object] = []

    def keep(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def norm(self, name: str) -> int:
        return self.keep(self._layers.tensor(f"{name}.weight").float())

    def layer(self, index: int) -> _Layer:
        name = f"layers.{index}"
        attention = [self._projection(f"{name}.self_attn.{each}_proj") for each in "qkvo"]
        inner = [self._projection(f"{name}.mlp.{each}_proj") for each in ("gate", "up", "down")]
        norms = [self.norm(f"{name}.{each}_layernorm") for each in ("input", "post_attention")]
        named = self._config.head_norms
        heads = [self.norm(f"{name}.self_attn.{each}_norm") if named else 0 for each in "qk"]
        return _Layer(*attention, *inner, *norms, *heads, self._config.windows[index] or 0)

    def _projection(self, name: str) -> _Projection:
        weight = self._layers.tensor(f"{name}.weight")
        out, into = weight.shape
        bias = f"{name}.bias"
        offset = self.keep(self._layers.tensor(bias).float()) if bias in self._layers.checkpoint.names else 0
        tasks = [self._low_rank(self._adapters.tasks[task], name) for task in sorted(self._adapters.names)]
        array = (_LowRank * len(tasks))(*tasks)
        self.kept.append(array)
        return _Projection(self._packed(weight), offset, ctypes.addressof(array), into, out)

    def _low_rank(self, adapter: Mapping[str, LowRank], name: str) -> _LowRank:
        pair = adapter.get(name)
        if pair is None:
            return _LowRank(None, None)
        more = self.rank - pair.down.shape[0]
        return _LowRank(
            self._packed(functional.pad(pair.down, (0, 0, 0, more))),
            self._packed(functional.pad(pair.up, (0, more))),
        )

    def _packed(self, weight: torch.Tensor) -> int:
        source = weight.to(torch.bfloat16).contiguous()
        out, into = source.shape
        packed = torch.empty(self._kernels.sf_packed_words(out, into), dtype=torch.int32)
        self._kernels.sf_pack(source.data_ptr(), out, into, packed.data_ptr())
        return self.keep(packed)

"""A decoder that answers, each step of it in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.modeling.layers.causal import (
    BLOCK,
    CausalForm,
    CausalLayer,
    CausalNetwork,
    CausalWeights,
    Chunk,
    Dense,
    TorchCausal,
    embed,
    refuse_foreign,
)
from services.core.modeling.native.angles import Angles
from services.core.modeling.native.library import check_sizes, passes, scratch
from services.core.modeling.native.weights import Linear, Packer

_POINTER = ctypes.c_void_p
_MOST_LAYERS = 42  # six phases each, see MOST_PHASES in team.h
_RUN_ROWS = 12  # RUN_ROWS in generate.h


class _Layer(ctypes.Structure):
    """``struct generate_layer`` of generate.h."""

    _fields_ = (
        *((name, Linear) for name in ("joined", "attended", "gate", "up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "inner_norm", "query_norm", "key_norm")),
    )


class _Generator(ctypes.Structure):
    """``struct generator`` of generate.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("width", "heads", "key_heads", "head_dim", "inner", "layers")),
        ("epsilon", ctypes.c_float),
        ("blocks", ctypes.c_int32),
        ("head", Linear),
        *((name, _POINTER) for name in ("norm", "layer", "keys", "values")),
    )


class _QueryRun(ctypes.Structure):
    """``struct query_run`` of generate.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("first", "count", "position", "unused")),
        ("table", _POINTER),
    )


class _Pass(ctypes.Structure):
    """``struct generate_pass`` of generate.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("generator", "hidden", "joined", "attended", "inner")),
        *(
            (name, _POINTER)
            for name in ("positions", "blocks", "cosines", "sines", "runs", "asked", "logits")
        ),
        *((name, ctypes.c_int64) for name in ("tokens", "run_count", "asked_count")),
    )


def serves(form: CausalForm, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run a network of this form, and faster than torch."""
    return (
        device.type == "cpu"
        and all(size % 2 == 0 for size in (form.width, form.inner, form.head_dim))
        and form.layers <= _MOST_LAYERS
        and passes(dtype) is not None
    )


def keeps_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights that a checkpoint has in bf16 stay so, though all is computed in fp32.

    The kernels widen them in the product: the same sums to the bit, and half the memory to read for a token.
    """
    kernels = passes(dtype) if device.type == "cpu" else None
    return kernels is not None and kernels.elements == torch.float32


def causal_network(weights: CausalWeights, device: torch.device, dtype: torch.dtype) -> CausalNetwork:
    """Make the network of ``weights`` as it runs fastest on ``device``."""
    if serves(weights.form, device, dtype):
        return FusedCausal(weights, dtype)
    return TorchCausal(weights, device, dtype)


class FusedCausal:
    """The network of ``TorchCausal``, with fp32 sums, norms and softmax; see ``CausalNetwork``.

    Matrices are kept as ``dtype``, or as they are where ``keeps_bf16``.
    """

    def __init__(self, weights: CausalWeights, dtype: torch.dtype) -> None:
        """Lay the weights out for the kernels; ``serves`` must have said yes."""
        kernels = passes(dtype)
        assert kernels is not None
        check_sizes(
            kernels, generate_layer=_Layer, generator=_Generator, query_run=_QueryRun, generate_pass=_Pass
        )
        self._kernels = kernels
        self.form = form = weights.form
        self._dtype = dtype
        self._packers = {each: Packer(kernels, each) for each in (dtype, torch.bfloat16)}
        self._words = weights.words.to(self._kept(weights.words)).contiguous()
        layers = [self._layer(layer) for layer in weights.layers]
        self._layers = (_Layer * len(layers))(*layers)
        self._angles = Angles(form.head_dim, form.rotary_base)
        self._generator = _Generator(
            *(form.width, form.heads, form.key_heads, form.head_dim, form.inner, form.layers),
            form.epsilon,
            0,
            self._linear(Dense(weights.head)),
            self._packers[dtype].numbers(weights.norm),
            ctypes.addressof(self._layers),
            None,
            None,
        )
        at = ctypes.addressof(self._generator)
        functions = kernels.functions
        self._head_numbers = functions.sf_cache_keys(at), functions.sf_cache_values(at)
        self._keys = self._values = torch.empty(0)

    @property
    def block_bytes(self) -> int:
        """See ``CausalNetwork``."""
        form = self.form
        return form.layers * form.key_heads * sum(self._head_numbers) * self._kernels.elements.itemsize

    def open_cache(self, blocks: int) -> None:
        """See ``CausalNetwork``."""
        form, elements = self.form, self._kernels.elements
        # Zeros: what was never written is multiplied by a weight of zero.
        self._keys, self._values = (
            torch.zeros(form.layers * blocks * form.key_heads * numbers, dtype=elements)
            for numbers in self._head_numbers
        )
        self._generator.blocks = blocks
        self._generator.keys, self._generator.values = self._keys.data_ptr(), self._values.data_ptr()

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See ``CausalNetwork``. Up to ``torch.get_num_threads()`` threads of the caller's setting work."""
        form, elements = self.form, self._kernels.elements
        refuse_foreign(chunks, len(self._words), form.positions, self._generator.blocks)
        with torch.inference_mode():
            hidden = embed(self._words, chunks, elements).contiguous()
        tokens = len(hidden)
        positions = _joined([np.arange(chunk.start, chunk.end) for chunk in chunks])
        blocks = _joined([chunk.blocks[np.arange(chunk.start, chunk.end) // BLOCK] for chunk in chunks])
        starts = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
        asked = np.array(
            [end - 1 for end, chunk in zip(starts[1:], chunks, strict=True) if chunk.asks], np.int32
        )
        tables = [np.ascontiguousarray(chunk.blocks, np.int32) for chunk in chunks]
        runs = [
            _QueryRun(
                first + row, min(_RUN_ROWS, len(chunk.ids) - row), chunk.start + row, 0, table.ctypes.data
            )
            for first, chunk, table in zip(starts, chunks, tables, strict=False)
            for row in range(0, len(chunk.ids), _RUN_ROWS)
        ]
        listed = (_QueryRun * len(runs))(*runs)
        angles = self._angles.up_to(int(positions.max()) + 1)
        heads = form.heads + 2 * form.key_heads
        joined = torch.empty(tokens, heads * form.head_dim, dtype=elements)
        attended = torch.empty(tokens, form.heads * form.head_dim, dtype=elements)
        inner = torch.empty(tokens, form.inner, dtype=elements)
        logits = torch.empty(len(asked), form.vocabulary)
        at, threads = ctypes.addressof(self._generator), torch.get_num_threads()
        given = _Pass(
            at,
            *(each.data_ptr() for each in (hidden, joined, attended, inner)),
            *(positions.ctypes.data, blocks.ctypes.data),
            *(angles.cosines.data_ptr(), angles.sines.data_ptr()),
            *(ctypes.addressof(listed), asked.ctypes.data, logits.data_ptr()),
            *(tokens, len(runs), len(asked)),
        )
        functions = self._kernels.functions
        own = scratch(functions.sf_generate_scratch(at, threads))
        functions.sf_generate(ctypes.addressof(given), own, threads)
        return logits

    def _layer(self, layer: CausalLayer) -> _Layer:
        def norm(weight: torch.Tensor | None) -> int | None:
            return None if weight is None else self._packers[self._dtype].numbers(weight)

        denses = (layer.joined, layer.attended, Dense(layer.gate), Dense(layer.up), Dense(layer.down))
        norms = (layer.attention_norm, layer.inner_norm, layer.query_norm, layer.key_norm)
        return _Layer(*map(self._linear, denses), *map(norm, norms))

    def _linear(self, dense: Dense) -> Linear:
        return self._packers[self._kept(dense.weight)].linear(*dense)

    def _kept(self, weight: torch.Tensor) -> torch.dtype:
        """Return what a matrix is kept as."""
        narrow = weight.dtype == torch.bfloat16 and self._kernels.elements == torch.float32
        return torch.bfloat16 if narrow else self._dtype


def _joined(parts: Sequence[NDArray[np.integer]]) -> NDArray[np.int32]:
    return np.concatenate(parts).astype(np.int32)

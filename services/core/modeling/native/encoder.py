"""A whole post-norm encoder in one call of the compiled kernels."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from services.core.modeling.layers.attention import alibi_slopes
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.post_norm import Dense, LayerWeights, NormWeights, PostNormWeights
from services.core.modeling.native.angles import Angles
from services.core.modeling.native.library import States, check_sizes, passes, scratch, storage
from services.core.modeling.native.weights import Linear, Packer, task_runs

_POINTER = ctypes.c_void_p
_MOST_LAYERS = 127  # two phases each, see MOST_PHASES in team.h


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _EncoderLayer(ctypes.Structure):
    """``struct encoder_layer`` of encoder.h."""

    _fields_ = (
        *((name, Linear) for name in ("query_key_value", "attention_output", "gate", "up", "down")),
        *((f"{name}_norm", _Norm) for name in ("query", "key", "attention", "input", "output")),
    )


class _Encoder(ctypes.Structure):
    """``struct encoder`` of encoder.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("width", "heads", "layers", "inner", "storage", "rank")),
        ("epsilon", ctypes.c_float),
        ("added_by_task", ctypes.c_int32),
        *((name, _POINTER) for name in ("words", "added", "word_tasks", "slopes")),
        ("norm", _Norm),
        ("layer", _POINTER),
    )


class _EncoderPass(ctypes.Structure):
    """``struct encoder_pass`` of encoder.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("encoder", "ids", "ends", "visible", "cosines", "sines", "runs")),
        *((name, ctypes.c_int64) for name in ("items", "longest")),
        ("hidden", _POINTER),
    )


def serves(width: int, inner: int, heads: int, layers: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run a network of this form, and faster than torch."""
    return (
        device.type == "cpu"
        and all(size % 2 == 0 for size in (width, inner, width // heads))
        and layers < _MOST_LAYERS
        and passes(dtype) is not None
    )


class FusedPostNorm:
    """The network of ``PostNormWeights``, with fp32 sums, norms and softmax."""

    def __init__(self, weights: PostNormWeights, dtype: torch.dtype) -> None:
        """Lay the weights out for the kernels; ``serves`` must have said yes."""
        kernels = passes(dtype)
        assert kernels is not None
        check_sizes(
            kernels, encoder=_Encoder, encoder_layer=_EncoderLayer, encoder_pass=_EncoderPass, linear=Linear
        )
        self._kernels = kernels
        self._dtype = dtype
        self._tasks = {task: i for i, task in enumerate(weights.tasks)}
        self._packer = Packer(kernels, dtype, weights.rank)
        layers = [self._layer(layer) for layer in weights.layers]
        self._layers = (_EncoderLayer * len(layers))(*layers)
        self.width = weights.words.shape[1]
        self._states = States(self.width, kernels.elements)
        base = weights.rotary_base
        self._angles = None if base is None else Angles(self.width // weights.heads, base)
        self._encoder = _Encoder(
            *(self.width, weights.heads, len(layers), layers[0].up.out, storage(dtype), self._packer.rank),
            weights.epsilon,
            weights.alibi or base is not None,
            *(self._packer.table(weights.words), self._packer.table(weights.positions)),
            self._packer.tables([weights.word_tasks[task] for task in weights.tasks]),
            self._packer.numbers(alibi_slopes(weights.heads)) if weights.alibi else None,
            self._norm(weights.norm),
            ctypes.addressof(self._layers),
        )

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width); see ``Backbone``.

        Up to ``torch.get_num_threads()`` threads of the calling thread's setting work on it.
        """
        threads = torch.get_num_threads()
        hidden = self._states.rows(batch.tokens)
        encoder = ctypes.addressof(self._encoder)
        runs = task_runs(batch.adapter_runs, self._tasks)
        visible = None if batch.attended is None else np.array(batch.attended, np.int32)
        angles = None if self._angles is None else self._angles.up_to(batch.max_length)
        given = _EncoderPass(
            *(encoder, batch.token_ids.data_ptr(), batch.cu_lengths.data_ptr()),
            None if visible is None else visible.ctypes.data,
            *((None, None) if angles is None else (angles.cosines.data_ptr(), angles.sines.data_ptr())),
            *(runs.ctypes.data, len(batch.lengths), batch.max_length, hidden.data_ptr()),
        )
        functions = self._kernels.functions
        own = scratch(functions.sf_encoder_scratch(encoder, batch.tokens, threads))
        functions.sf_encode(ctypes.addressof(given), own, threads)
        return hidden.to(self._dtype)

    def _norm(self, gain: NormWeights | None) -> _Norm:
        if gain is None:
            return _Norm(None, None)
        return _Norm(self._packer.numbers(gain.weight), self._packer.numbers(gain.bias))

    def _linear(self, dense: Dense | None) -> Linear:
        if dense is None:
            return Linear()
        return self._packer.linear(dense.weight, dense.bias, [dense.tasks.get(task) for task in self._tasks])

    def _layer(self, layer: LayerWeights) -> _EncoderLayer:
        linears = (layer.query_key_value, layer.attended, layer.gate, layer.up, layer.down)
        norms = (layer.query_norm, layer.key_norm, layer.attended_norm, layer.input_norm, layer.down_norm)
        return _EncoderLayer(*map(self._linear, linears), *map(self._norm, norms))

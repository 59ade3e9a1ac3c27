"""A whole post-norm encoder in one call of the compiled kernels."""

from __future__ import annotations

import ctypes

import torch

from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.post_norm import Dense, Gain, LayerWeights, PostNormWeights
from services.core.modeling.native.instructions import current
from services.core.modeling.native.library import library, scratch

_POINTER = ctypes.c_void_p
_MOST_LAYERS = 127  # two phases each, see MOST_PHASES in team.h


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("into", ctypes.c_int64),
        ("out", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("query_key_value", _Linear),
        ("attended", _Linear),
        ("up", _Linear),
        ("down", _Linear),
        ("attended_norm", _Norm),
        ("down_norm", _Norm),
    )


class _Encoder(ctypes.Structure):
    """``struct encoder`` of encoder.h."""

    _fields_ = (
        ("width", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("words", _POINTER),
        ("positions", _POINTER),
        ("norm", _Norm),
        ("layer", _POINTER),
    )


def serves(width: int, inner: int, heads: int, layers: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run a network of this form faster than torch."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and width % 16 == 0
        and inner % 16 == 0
        and (width // heads) % 2 == 0
        and not current().passes_on_torch
        and layers < _MOST_LAYERS
        and library() is not None
    )


class FusedPostNorm:
    """The network of ``post_norm.PostNorm`` in bf16 with fp32 sums, norms and softmax."""

    def __init__(self, weights: PostNormWeights) -> None:
        """Lay the weights out for the kernels; ``serves`` must have said yes."""
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        self._kept: list[torch.Tensor] = []
        layers = [self._layer(layer) for layer in weights.layers]
        self._layers = (_Layer * len(layers))(*layers)
        self.width = weights.words.shape[1]
        self._encoder = _Encoder(
            self.width,
            weights.heads,
            len(layers),
            layers[0].up.out,
            weights.epsilon,
            self._keep(weights.words, torch.bfloat16),
            self._keep(weights.positions, torch.bfloat16),
            self._norm(weights.norm),
            ctypes.addressof(self._layers),
        )

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width) bf16.

        Up to ``torch.get_num_threads()`` threads of the calling thread's setting work on it.
        """
        longest, threads = batch.max_length, torch.get_num_threads()
        hidden = torch.empty(batch.tokens, self.width, dtype=torch.bfloat16)
        encoder = ctypes.addressof(self._encoder)
        self._kernels.sf_encode(
            encoder,
            batch.token_ids.data_ptr(),
            batch.cu_lengths.data_ptr(),
            len(batch.lengths),
            longest,
            hidden.data_ptr(),
            scratch(self._kernels.sf_encoder_scratch(encoder, batch.tokens, threads)),
            threads,
        )
        return hidden

    def _keep(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        self._kept.append(tensor.to(dtype).contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, gain: Gain) -> _Norm:
        return _Norm(self._keep(gain.weight, torch.float32), self._keep(gain.bias, torch.float32))

    def _linear(self, dense: Dense) -> _Linear:
        out, into = dense.weight.shape
        source = dense.weight.to(torch.bfloat16).contiguous()
        packed = torch.empty(self._kernels.sf_packed_words(out, into), dtype=torch.int32)
        self._kernels.sf_pack(source.data_ptr(), out, into, packed.data_ptr())
        return _Linear(self._keep(packed, torch.int32), self._keep(dense.bias, torch.float32), into, out)

    def _layer(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            self._linear(layer.query_key_value),
            self._linear(layer.attended),
            self._linear(layer.up),
            self._linear(layer.down),
            self._norm(layer.attended_norm),
            self._norm(layer.down_norm),
        )

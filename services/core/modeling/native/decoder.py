"""A whole decoder, task adapters included, in one call of the compiled kernels."""

from __future__ import annotations

import ctypes

import torch

from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.families.decoder_config import DecoderConfig
from services.core.modeling.layers.packed import PackedBatch
from services.core.modeling.layers.reading import Layers
from services.core.modeling.native.angles import Angles
from services.core.modeling.native.library import States, check_sizes, passes, scratch, storage
from services.core.modeling.native.weights import Linear, Packer, task_runs

_POINTER = ctypes.c_void_p
_MOST_LAYERS = 127  # two phases each, see MOST_PHASES in team.h


class _DecoderLayer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in ("query", "key", "value", "attention_output", "gate", "up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """``struct decoder`` of decoder.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("width", "heads", "key_heads", "head_dim", "inner", "layers")),
        *((name, ctypes.c_int32) for name in ("rank", "causal", "storage")),
        ("epsilon", ctypes.c_float),
        ("words", _POINTER),
        ("norm", _POINTER),
        ("layer", _POINTER),
    )


class _DecoderPass(ctypes.Structure):
    """``struct decoder_pass`` of decoder.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("decoder", "ids", "positions", "ends", "requested")),
        *((name, _POINTER) for name in ("cosines", "sines", "runs", "requested_runs")),
        *((name, _POINTER) for name in ("inserted_rows", "inserted")),
        *((name, ctypes.c_int64) for name in ("items", "longest", "tokens", "requested_count")),
        *((name, _POINTER) for name in ("hidden", "qkv", "attended")),
    )


def serves(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run a network of this form, and faster than torch."""
    return (
        device.type == "cpu"
        and all(size % 2 == 0 for size in (config.width, config.inner, config.head_dim))
        and config.layers <= _MOST_LAYERS
        and passes(dtype) is not None
    )


class FusedDecoder:
    """The network of ``decoder.Decoder``, with fp32 sums, norms and softmax."""

    def __init__(self, layers: Layers, config: DecoderConfig, adapters: PeftAdapters) -> None:
        """Read the weights and lay them out for the kernels; ``serves`` must have said yes."""
        kernels = passes(layers.dtype)
        assert kernels is not None
        self._kernels = kernels
        self._dtype = layers.dtype
        self._config = config
        self._tasks = {task: i for i, task in enumerate(sorted(adapters.names))}
        self._angles = Angles(config.head_dim, config.rotary_base)
        self._packer = Packer(kernels, layers.dtype, adapters.rank)
        heads = (config.heads + 2 * config.key_heads, config.heads)
        widths = (config.width, *(count * config.head_dim for count in heads))
        self._states = [States(width, kernels.elements) for width in widths]
        check_sizes(
            kernels, decoder=_Decoder, decoder_layer=_DecoderLayer, decoder_pass=_DecoderPass, linear=Linear
        )
        reader = _Reader(self._packer, layers, config, adapters)
        blocks = [reader.layer(i) for i in range(config.layers)]
        self._layers = (_DecoderLayer * len(blocks))(*blocks)
        self._decoder = _Decoder(
            *(config.width, config.heads, config.key_heads, config.head_dim, config.inner, config.layers),
            *(self._packer.rank, config.causal, storage(layers.dtype)),
            config.epsilon,
            self._packer.table(layers.tensor("embed_tokens.weight")),
            reader.norm("norm"),
            ctypes.addressof(self._layers),
        )

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width); see ``Backbone``.

        Up to ``torch.get_num_threads()`` threads of the calling thread's setting work on it.
        """
        threads = torch.get_num_threads()
        tokens, longest = batch.tokens, batch.max_length
        if batch.rotation is None:
            positions, angles = batch.positions(), self._angles.up_to(longest)
        else:
            positions, angles = torch.arange(tokens, dtype=torch.int32), batch.rotation
        inserted_rows, inserted = self._inserted(batch)
        runs, requested_runs = (
            task_runs(batch.adapter_runs, self._tasks),
            task_runs(batch.wanted_runs, self._tasks),
        )
        requested = batch.wanted
        hidden, qkv, attended = (states.rows(tokens) for states in self._states)
        decoder = ctypes.addressof(self._decoder)
        given = _DecoderPass(
            *(decoder, batch.token_ids.data_ptr(), positions.data_ptr(), batch.cu_lengths.data_ptr()),
            None if requested is None else requested.ctypes.data,
            *(
                angles.cosines.data_ptr(),
                angles.sines.data_ptr(),
                runs.ctypes.data,
                requested_runs.ctypes.data,
            ),
            None if inserted_rows is None else inserted_rows.data_ptr(),
            None if inserted is None else inserted.data_ptr(),
            *(len(batch.lengths), longest, tokens, tokens if requested is None else len(requested)),
            *(hidden.data_ptr(), qkv.data_ptr(), attended.data_ptr()),
        )
        functions = self._kernels.functions
        own = scratch(functions.sf_decoder_scratch(decoder, threads))
        functions.sf_decode(ctypes.addressof(given), own, threads)
        return hidden.to(self._dtype)

    def _inserted(self, batch: PackedBatch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return for each token the row of the states that stand for it, or -1, and those states."""
        if batch.inserted is None:
            return None, None
        places, states = batch.inserted.places, batch.inserted.states
        if states.shape != (len(places), self._config.width):
            raise ValueError(f"states {list(states.shape)} for {len(places)} tokens")
        rows = torch.full((batch.tokens,), -1, dtype=torch.int32)
        rows[places] = torch.arange(len(places), dtype=torch.int32)
        return rows, states.to(self._kernels.elements).contiguous()


class _Reader:
    """Reads the layers of a checkpoint into the structs of the kernels."""

    def __init__(self, packer: Packer, layers: Layers, config: DecoderConfig, adapters: PeftAdapters) -> None:
        self._packer = packer
        self._layers = layers
        self._config = config
        self._adapters = adapters

    def norm(self, name: str) -> int:
        return self._packer.numbers(self._layers.tensor(f"{name}.weight"))

    def layer(self, index: int) -> _DecoderLayer:
        name = f"layers.{index}"
        attention = [self._linear(f"{name}.self_attn.{each}_proj") for each in "qkvo"]
        inner = [self._linear(f"{name}.mlp.{each}_proj") for each in ("gate", "up", "down")]
        norms = [self.norm(f"{name}.{each}_layernorm") for each in ("input", "post_attention")]
        named = self._config.head_norms
        heads = [self.norm(f"{name}.self_attn.{each}_norm") if named else 0 for each in "qk"]
        return _DecoderLayer(*attention, *inner, *norms, *heads, self._config.windows[index] or 0)

    def _linear(self, name: str) -> Linear:
        bias = f"{name}.bias"
        tasks = [self._adapters.tasks[task].get(name) for task in sorted(self._adapters.names)]
        return self._packer.linear(
            self._layers.tensor(f"{name}.weight"),
            self._layers.tensor(bias) if bias in self._layers.checkpoint.names else None,
            [None if pair is None else (pair.down, pair.up) for pair in tasks],
        )

"""The compiled kernels of the instruction set that this process uses."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from services.core.modeling.native.instructions import InstructionSet, current


class Kernels(NamedTuple):
    """The compiled kernels of one instruction set; ``elements`` is what they compute with between layers."""

    functions: ctypes.CDLL
    elements: torch.dtype


def library(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels of the chosen instruction set for weights of ``dtype``, loaded once; None without.

    Those that multiply bf16 know nothing else: there fp32 is that of the set below.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    chosen = current()
    below = chosen.multiplies_bf16 and dtype == torch.float32
    return load(InstructionSet.AVX512 if below else chosen)


def passes(dtype: torch.dtype) -> Kernels | None:
    """As ``library``, but None too where torch runs whole networks of ``dtype`` faster."""
    if dtype == torch.bfloat16 and current().passes_on_torch:
        return None
    return library(dtype)


@cache
def load(instructions: InstructionSet) -> Kernels | None:
    """Load the kernels of a set that the CPU has; None if they were not compiled."""
    path = instructions.kernels
    return None if path is None else open_library(path)


def open_library(path: Path) -> Kernels:
    """Load a compiled file."""
    functions = _declare(ctypes.CDLL(str(path)))
    return Kernels(functions, torch.bfloat16 if functions.sf_bf16_elements() else torch.float32)


def storage(dtype: torch.dtype) -> int:
    """Return what the kernels call weights of ``dtype``: ``enum storage`` of tile.h."""
    return int(dtype == torch.bfloat16)


def check_sizes(kernels: Kernels, **structs: type[ctypes.Structure]) -> None:
    """Compare the mirrors of C structs, by their C names, with what the compiler made of them."""
    names = (
        *("attention", "encoder", "encoder_layer", "encoder_pass"),
        *("decoder", "decoder_layer", "decoder_pass", "linear"),
        *("generate_layer", "generator", "query_run", "generate_pass"),
    )
    for name, mirror in structs.items():
        size = kernels.functions.sf_sizeof(names.index(name))
        if size != ctypes.sizeof(mirror):
            raise RuntimeError(f"struct {name} has {size} bytes in C, {ctypes.sizeof(mirror)} in Python")


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, int32, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_size_t
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "sf_bf16_elements": (int32, ()),
        "sf_sizeof": (size, (int32,)),
        "sf_packed_bytes": (size, (number, number, int32)),
        "sf_pack": (None, (pointer, number, number, int32, pointer)),
        "sf_attention_scratch": (size, (int32, int32, int32)),
        "sf_attention": (
            None,
            (pointer, pointer, pointer, pointer, pointer, pointer, number, pointer, number, int32),
        ),
        "sf_encoder_scratch": (size, (pointer, number, int32)),
        "sf_encode": (None, (pointer, pointer, int32)),
        "sf_decoder_scratch": (size, (pointer, int32)),
        "sf_decode": (None, (pointer, pointer, int32)),
        "sf_cache_keys": (number, (pointer,)),
        "sf_cache_values": (number, (pointer,)),
        "sf_generate_scratch": (size, (pointer, int32)),
        "sf_generate": (None, (pointer, pointer, int32)),
        "sf_rope": (None, (pointer, number, number, int32, int32, pointer, pointer)),
        "sf_lora": (
            None,
            (pointer, number, number, pointer, pointer, number, number, int32, pointer),
        ),
        "sf_mean": (None, (pointer, pointer, number, number, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(kernels, name)
        function.restype = result
        function.argtypes = arguments
    return kernels


class _Scratch(threading.local):
    buffer = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def scratch(size: int) -> int:
    """Return the address of at least ``size`` bytes that belong to this thread until its next call."""
    if _scratch.buffer.numel() < size:
        _scratch.buffer = torch.empty(size, dtype=torch.uint8)
    return _scratch.buffer.data_ptr()


_KEPT_BYTES = 4 << 20
"""Of the states of a pass, up to which their memory is kept for the next one."""

_ROWS = 64


class States:
    """Memory for the states of the passes of one network, for each thread its own, and used again.

    What is taken anew for each pass leaves a hole behind between the results of the passes around it, which
    a call of many texts holds to its end: 0.4 MiB for each text of 512 tokens.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._width = width
        self._dtype = dtype
        self._kept = threading.local()

    def rows(self, tokens: int) -> torch.Tensor:
        """Return (tokens, width), not set, which belong to the calling thread until its next call."""
        rows = -(-tokens // _ROWS) * _ROWS
        if rows * self._width * self._dtype.itemsize > _KEPT_BYTES:
            return torch.empty(tokens, self._width, dtype=self._dtype)
        kept: torch.Tensor | None = getattr(self._kept, "states", None)
        if kept is None or kept.shape[0] < tokens:
            kept = self._kept.states = torch.empty(rows, self._width, dtype=self._dtype)
        return kept[:tokens]

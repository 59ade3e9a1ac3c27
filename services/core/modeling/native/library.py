"""The compiled kernels, where this CPU has the instructions and the package was built with a C compiler."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import torch

from services.core.modeling.native.instructions import InstructionSet, current


def library() -> ctypes.CDLL | None:
    """The kernels of the chosen instruction set, loaded once; None where there are none."""
    return _load(current())


@cache
def _load(instructions: InstructionSet) -> ctypes.CDLL | None:
    path = instructions.kernels
    return None if path is None else _declare(ctypes.CDLL(str(path)))


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, int32, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_size_t
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "sf_packed_words": (size, (number, number)),
        "sf_pack": (None, (pointer, number, number, pointer)),
        "sf_attention_scratch": (size, (int32, int32, int32)),
        "sf_attention": (
            None,
            (pointer, pointer, pointer, pointer, pointer, pointer, number, pointer, number, int32),
        ),
        "sf_encoder_scratch": (size, (pointer, number, int32)),
        "sf_encode": (None, (pointer, pointer, pointer, number, number, pointer, pointer, int32)),
        "sf_decoder_scratch": (size, (pointer, int32)),
        "sf_decode": (None, (pointer, pointer, int32)),
        "sf_turn": (None, (pointer, number, number, int32, int32, pointer, pointer)),
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

"""The compiled kernels, where this CPU has the instructions and the package was built with a C compiler."""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "fma3")


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernels once; None where there are none, and the log says why."""
    can = torch.cpu.get_capabilities()
    lacking = [name for name in _NEEDED if not can.get(name)]
    if lacking:
        log.info("native kernels are off: this CPU lacks %s", ", ".join(lacking))
        return None
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.is_file():
            return _declare(ctypes.CDLL(str(path)))
    log.warning("native kernels are off: %s holds no compiled _kernels; bf16 runs on torch, slower", folder)
    return None


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

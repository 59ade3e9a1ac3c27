"""Which instructions of the CPU a process computes with: the one place that decides it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from enum import StrEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent


class InstructionSet(StrEnum):
    """What the networks are computed with on a CPU, the fastest first.

    With ``AMX`` bf16 networks run on torch, whose products (oneDNN's) use its tiles, with the kernels of
    ``AVX512_BF16`` beside them; a tile of ours has not been shown to be faster. ``PORTABLE`` is for every
    processor. With ``TORCH`` nothing is compiled and torch does everything.
    """

    AMX = "amx"
    AVX512_BF16 = "avx512_bf16"
    AVX512 = "avx512"
    AVX2 = "avx2"
    NEON = "neon"
    PORTABLE = "portable"
    TORCH = "torch"

    @property
    def multiplies_bf16(self) -> bool:
        """Whether bf16 is faster than fp32 with it, since its products take bf16 as it is."""
        return self in (InstructionSet.AMX, InstructionSet.AVX512_BF16)

    @property
    def passes_on_torch(self) -> bool:
        """Whether torch runs bf16 networks faster than the compiled passes would."""
        return self in (InstructionSet.AMX, InstructionSet.TORCH)

    @property
    def kernels(self) -> Path | None:
        """The compiled file, if it was built."""
        name = InstructionSet.AVX512_BF16 if self is InstructionSet.AMX else self
        paths = (_FOLDER / f"_kernels_{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
        return next((path for path in paths if path.is_file()), None)


_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3")

_NEEDED: Mapping[InstructionSet, tuple[str, ...]] = {
    InstructionSet.AMX: ("amx_tile", "amx_bf16", *_AVX512, "avx512_bf16"),
    InstructionSet.AVX512_BF16: (*_AVX512, "avx512_bf16"),
    InstructionSet.AVX512: _AVX512,
    InstructionSet.AVX2: ("avx2", "fma3", "f16c"),
    InstructionSet.NEON: ("neon",),
    InstructionSet.PORTABLE: (),
    InstructionSet.TORCH: (),
}
"""Names of ``torch.cpu.get_capabilities()``, which asks the processor and heeds no switch of torch."""

_ONEDNN = {
    InstructionSet.AVX512_BF16: "AVX512_CORE_BF16",
    InstructionSet.AVX512: "AVX512_CORE",
    InstructionSet.AVX2: "AVX2",
    InstructionSet.PORTABLE: "SSE41",
}
"""What oneDNN is lowered to where a lower set than the CPU's best was asked for."""


class _Chosen:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.instructions: InstructionSet | None = None


_chosen = _Chosen()


def choose(name: str = "auto") -> InstructionSet:
    """Take a set by name from now on, ``auto`` being the best one; what is loaded already keeps its own.

    ValueError if the CPU lacks it or it was not compiled, naming those that there are.
    """
    here = available()
    if name == "auto":
        chosen = here[0]
    else:
        try:
            chosen = InstructionSet(name)
        except ValueError:
            raise ValueError(f"'{name}' is no instruction set; use auto or one of {_names(here)}") from None
        if chosen not in here:
            raise ValueError(f"the instruction set {chosen} {_why_not(chosen)}; there are {_names(here)}")
    if name != "auto" and chosen is not here[0] and chosen in _ONEDNN:
        # Read by oneDNN at its first product.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", _ONEDNN[chosen])
    with _chosen.lock:
        _chosen.instructions = chosen
    log.log(logging.INFO if _best().kernels else logging.WARNING, "computing with %s", describe())
    return chosen


def current() -> InstructionSet:
    """The chosen set; ``auto`` if nobody chose."""
    return _chosen.instructions or choose()


def available() -> tuple[InstructionSet, ...]:
    """The sets that this CPU has and that were compiled, the fastest first."""
    return tuple(which for which in InstructionSet if not _why_not(which))


def describe() -> str:
    """The chosen set, and what keeps this process from a faster one, in words."""
    chosen, best = current(), _best()
    if chosen is best:
        return f"{chosen}, the best instruction set of this CPU"
    return f"{chosen}; the CPU also has {best}, which " + (_why_not(best) or "was not asked for")


def _best() -> InstructionSet:
    return next(which for which in InstructionSet if not _lacking(which))


def _lacking(which: InstructionSet) -> tuple[str, ...]:
    can: Mapping[str, Any] = torch.cpu.get_capabilities()
    return tuple(name for name in _NEEDED[which] if not can.get(name))


def _why_not(which: InstructionSet) -> str:
    """Why a set cannot be used here, behind its name; empty if it can."""
    if lacking := _lacking(which):
        return f"is not this CPU's, which lacks {', '.join(lacking)}"
    if which is not InstructionSet.TORCH and which.kernels is None:
        return f"was not compiled: {_FOLDER} holds no _kernels for it"
    return ""


def _names(sets: tuple[InstructionSet, ...]) -> str:
    return ", ".join(sets)

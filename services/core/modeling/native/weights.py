"""Weights as the compiled kernels read them, and the tasks of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.modeling.layers.packed import AdapterRun
from services.core.modeling.native.library import Kernels, storage

_POINTER = ctypes.c_void_p


class _Lora(ctypes.Structure):
    _fields_ = (("a", _POINTER), ("b", _POINTER))


class Linear(ctypes.Structure):
    """``struct linear`` of linear.h."""

    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("tasks", _POINTER),
        ("into", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("storage", ctypes.c_int32),
    )


class Packer:
    """Lays weights of one network out for ``kernels`` and keeps what it made."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, rank: int = 0) -> None:
        """Store weights as ``dtype``; adapters are padded to an even ``rank``."""
        self._kernels = kernels
        self._dtype = dtype
        self._kept: list[object] = []
        self.rank = rank + rank % 2

    def numbers(self, tensor: torch.Tensor) -> int:
        """Keep fp32 numbers: a bias, or the weight of a norm."""
        return self._keep(tensor.float().contiguous())

    def table(self, tensor: torch.Tensor) -> int:
        """Keep a table as it is."""
        return self._keep(tensor.to(self._dtype).contiguous())

    def tables(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int | None:
        """Keep what each task adds to a table: A (entries, rank) and B (rank, width); None without a task."""
        if not pairs:
            return None
        padded = [(a, b, self.rank - a.shape[1]) for a, b in pairs]
        tasks = (_Lora * len(pairs))(
            *(
                _Lora(
                    self.table(functional.pad(a, (0, more))), self.table(functional.pad(b, (0, 0, 0, more)))
                )
                for a, b, more in padded
            )
        )
        self._kept.append(tasks)
        return ctypes.addressof(tasks)

    def linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        tasks: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = (),
    ) -> Linear:
        """Lay out a layer of ``weight`` (out, in) and, for each task, A (rank, in) and B (out, rank)."""
        out, into = weight.shape
        adapters = (_Lora * len(tasks))(*map(self._lora, tasks))
        self._kept.append(adapters)
        return Linear(
            self._packed(weight),
            None if bias is None else self.numbers(bias),
            ctypes.addressof(adapters) if any(pair is not None for pair in tasks) else None,
            *(into, out, self.rank, storage(self._dtype)),
        )

    def _lora(self, pair: tuple[torch.Tensor, torch.Tensor] | None) -> _Lora:
        if pair is None:
            return _Lora(None, None)
        a, b = pair
        more = self.rank - a.shape[0]
        return _Lora(
            self._packed(functional.pad(a, (0, 0, 0, more))), self._packed(functional.pad(b, (0, more)))
        )

    def _packed(self, weight: torch.Tensor) -> int:
        functions, form = self._kernels.functions, storage(self._dtype)
        source = weight.to(self._dtype).contiguous()
        out, into = source.shape
        packed = torch.empty(functions.sf_packed_bytes(out, into, form), dtype=torch.uint8)
        functions.sf_pack(source.data_ptr(), out, into, form, packed.data_ptr())
        return self._keep(packed)

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def task_runs(runs: Sequence[AdapterRun], tasks: Mapping[str, int]) -> NDArray[np.int32]:
    """Return (runs + 1, 3): start, end and task of each, and one that lies behind all rows."""
    end = np.iinfo(np.int32).max
    rows = [(run.start, run.end, -1 if run.adapter is None else tasks[run.adapter]) for run in runs]
    return np.array([*rows, (end, end, -1)], np.int32)

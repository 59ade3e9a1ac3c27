"""Whether the weights of a model fit into what is left of the memory they are to live in."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import torch

from services.core.catalog.headers import BrokenFileError, read_header
from services.core.modeling.checkpoints.checkpoint import CheckpointError

_GIB = 1 << 30

_RESERVE = 0.1
"""Part of the free memory that is left to running the models, unless the operator says how much they get."""

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP = Path("/sys/fs/cgroup")


_CHANGED_INSIDE = ".parametrizations.weight.original"
_CHANGED_BESIDE = "_proj.weight"
"""In the names of tensors that adapters change: those of the same checkpoint, those of folders beside it."""

_TOWERS = ("visual.", "vision_tower.", "audio_tower.")
"""In the names of towers' tensors, which adapters beside a checkpoint leave alone."""


class NotEnoughMemoryError(Exception):
    """A model that does not fit; the text is for the operator."""


class Budget:
    """Bytes of a device for the weights of all models of this process; ``booked`` are taken.

    Running them takes more, which is not known here: without a ``chosen`` limit a part of what is free now
    is left for that. Of several ``processes``, which may have loaded theirs already, none gets more than its
    part of the whole.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, chosen: int | None = None, processes: int = 1
    ) -> None:
        self._device = device
        self._dtype = str(dtype).removeprefix("torch.")
        self._where = "of main memory" if device.type == "cpu" else f"on {device}"
        self._chosen = chosen is not None
        self.limit = chosen
        if chosen is None:
            free, total = free_bytes(device), total_bytes(device)
            shares = [free, total // processes if total is not None and processes > 1 else None]
            limits = [int(share * (1 - _RESERVE)) for share in shares if share is not None]
            self.limit = min(limits, default=None)
        self.booked = 0

    def __str__(self) -> str:
        whole = "" if self.limit is None else f" of {self.limit / _GIB:.2f}"
        return f"{self.booked / _GIB:.2f}{whole} GiB {self._where} are taken"

    def lacks(self, size: int) -> bool:
        """Whether there is no room for ``size`` bytes now, in the budget or on the device."""
        if self.limit is not None and self.booked + size > self.limit:
            return True
        free = free_bytes(self._device)
        return free is not None and size > free

    def require(self, sizes: Mapping[str, int]) -> None:
        """Raise NotEnoughMemoryError if models of such ``sizes`` can never be in memory together."""
        if self.limit is None:
            return
        if too_large := {name: size for name, size in sizes.items() if size > self.limit}:
            name, size = max(too_large.items(), key=lambda item: item[1])
            raise NotEnoughMemoryError(
                f"{name} takes {self._weights(size)}, and {self._allowed(self.limit)}. "
                "Choose a smaller one, or give it more memory."
            )
        if sum(sizes.values()) > self.limit:
            each = ", ".join(f"{name} ({size / _GIB:.2f} GiB)" for name, size in sizes.items())
            whole = self._weights(sum(sizes.values()))
            raise NotEnoughMemoryError(
                f"{each} together take {whole}, and {self._allowed(self.limit)}. "
                "Serve fewer models in this process, choose smaller ones, give it more memory, or let "
                "SF_MODEL_RESIDENCY=lazy load each when it is called."
            )

    def shortage(self, name: str, size: int) -> NotEnoughMemoryError:
        """Word that others than the models of this process have taken the memory."""
        free = free_bytes(self._device) or 0
        return NotEnoughMemoryError(
            f"{name} takes {self._weights(size)}, and {free / _GIB:.2f} GiB {self._where} are left. "
            "Something else has taken the rest."
        )

    def _weights(self, size: int) -> str:
        return f"{size / _GIB:.2f} GiB for weights in {self._dtype}"

    def _allowed(self, limit: int) -> str:
        if self._chosen:
            return f"SF_DEVICE_MEMORY_BYTES allows {limit / _GIB:.2f} GiB {self._where}"
        return f"{limit / _GIB:.2f} GiB {self._where} are free for models"


def weight_bytes(
    directory: Path, dtype: torch.dtype, *, merged: bool = False, narrow: tuple[str, ...] = ()
) -> int:
    """Bytes that all tensors of a checkpoint, adapters included, take as ``dtype``.

    With ``merged`` what adapters change is there twice: as it is, and with the changes of the task in use.
    Tensors whose names begin with one of ``narrow`` stay bf16 where the file has them so.
    """
    base, adapters = list(directory.glob("*.safetensors")), list(directory.glob("adapters/**/*.safetensors"))
    try:
        tensors = [tensor for file in base for tensor in read_header(file)]
        elements = sum(tensor.elements for tensor in tensors)
        elements += sum(tensor.elements for file in adapters for tensor in read_header(file))
        if merged:
            changed = _CHANGED_BESIDE if adapters else _CHANGED_INSIDE
            elements += sum(
                tensor.elements
                for tensor in tensors
                if changed in tensor.name and not any(tower in tensor.name for tower in _TOWERS)
            )
        kept = sum(each.elements for each in tensors if each.dtype == "BF16" and each.name.startswith(narrow))
        return dtype.itemsize * elements - (dtype.itemsize - torch.bfloat16.itemsize) * kept
    except BrokenFileError as error:
        raise CheckpointError(str(error)) from error


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    limits = [room for room in (_meminfo("MemAvailable"), _container_room(_CGROUP)) if room is not None]
    return min(limits, default=None)


def total_bytes(device: torch.device) -> int | None:
    """Bytes that ``device`` has: of a CPU the machine's or the container's; None if the system is silent."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [limit for limit in (_meminfo("MemTotal"), _container_limit(_CGROUP)) if limit is not None]
    return min(limits, default=None)


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds on ``device``; on a CPU all that is resident of it."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(_STATM.read_text().split()[1]) * resource.getpagesize() if _STATM.is_file() else 0


def _meminfo(name: str) -> int | None:
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def _container_limit(group: Path) -> int | None:
    """Limit of the control group (version 2), None without one."""
    limit = group / "memory.max"
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return None
    return int(text)


def _container_room(group: Path) -> int | None:
    """Room below the limit of the control group (version 2), the file cache counted as free."""
    limit = _container_limit(group)
    if limit is None:
        return None
    used = int((group / "memory.current").read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))

"""Whether the weights of a model fit into what is left of the memory they are to live in."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from services.core.catalog.headers import BrokenFileError, read_header
from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoint import CheckpointError

_GIB = 1 << 30
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP = Path("/sys/fs/cgroup")


class NotEnoughMemoryError(Exception):
    """A model that does not fit; the text is for the operator."""


def require_room(spec: ModelSpec, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model whose weights in ``directory``, held as ``dtype``, do not fit into free memory.

    What running takes comes on top and is not known here. Raises NotEnoughMemoryError, and CheckpointError
    for a file whose header cannot be read.
    """
    needed, free = weight_bytes(directory, dtype), free_bytes(device)
    if free is not None and needed > free:
        kind = str(dtype).removeprefix("torch.")
        where = "of main memory" if device.type == "cpu" else f"on {device}"
        raise NotEnoughMemoryError(
            f"{spec.id} takes {needed / _GIB:.2f} GiB for its weights in {kind}, "
            f"and {free / _GIB:.2f} GiB {where} are free. "
            "Serve fewer models in this process, choose a smaller one, or give it more memory."
        )


def weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes that all tensors of a checkpoint, adapters included, take as ``dtype``."""
    files = [*directory.glob("*.safetensors"), *directory.glob("adapters/*/*.safetensors")]
    try:
        return dtype.itemsize * sum(tensor.elements for file in files for tensor in read_header(file))
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

"""Whether the weights of a model fit into what is left of the memory they are to live in."""

from __future__ import annotations

from pathlib import Path

import torch

from services.core.catalog.headers import BrokenFileError, read_header
from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoint import CheckpointError

_GIB = 1 << 30
_MEMINFO = Path("/proc/meminfo")
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
    limits = [room for room in (_machine_room(_MEMINFO), _container_room(_CGROUP)) if room is not None]
    return min(limits, default=None)


def _machine_room(file: Path) -> int | None:
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _container_room(group: Path) -> int | None:
    """Room below the limit of the control group (version 2), the file cache counted as free."""
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    used = int((group / "memory.current").read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, int(limit.read_text()) - used + int(statistics.get("inactive_file", 0)))

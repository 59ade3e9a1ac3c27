"""What safetensors files hold, read from their headers alone: no tensor is loaded, no torch needed."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

_MAX_HEADER = 100 << 20
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


class BrokenFileError(Exception):
    """A file that is not a whole safetensors file; the text names it and says what is wrong."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[TensorInfo, ...]:
    """The tensors of one file. Raises ``BrokenFileError`` unless the header fits the file to the byte."""
    try:
        with path.open("rb") as handle:
            length = handle.read(8)
            if len(length) < 8:
                raise BrokenFileError(f"{path}: too short for a safetensors file.")
            (size,) = struct.unpack("<Q", length)
            if size > _MAX_HEADER:
                raise BrokenFileError(f"{path}: not a safetensors file.")
            header = json.loads(handle.read(size))
        return _tensors(path, cast("dict[str, Any]", header), 8 + size)
    except OSError as error:
        raise BrokenFileError(f"{path}: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenFileError(f"{path}: its header cannot be read.") from error


def _tensors(path: Path, header: dict[str, Any], start: int) -> tuple[TensorInfo, ...]:
    header.pop("__metadata__", None)
    end = 0
    tensors: list[TensorInfo] = []
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        tensor = TensorInfo(name, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
        first, last = entry["data_offsets"]
        if first != end or (last - first) * 8 != tensor.elements * _BITS[tensor.dtype]:
            raise BrokenFileError(f"{path}: the place of tensor '{name}' does not fit its shape.")
        end = last
        tensors.append(tensor)
    if path.stat().st_size != start + end:
        raise BrokenFileError(f"{path}: {path.stat().st_size:,} bytes long, its header says {start + end:,}.")
    return tuple(tensors)


def totals(tensors: tuple[TensorInfo, ...]) -> Mapping[str, int]:
    """Values by dtype, most first."""
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.elements
    return dict(count.most_common())

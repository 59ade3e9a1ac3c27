"""Writing float32 vectors as bits, bytes and JSON values."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np
import numpy.typing as npt

from services.embed.types import Encoding

FloatMatrix = npt.NDArray[np.float32]
FloatVector = npt.NDArray[np.float32]
_OFFSET = 128


def pack_bits(vectors: FloatMatrix) -> npt.NDArray[np.uint8]:
    """One bit per component, set where it is above zero: (n, width) to (n, ceil(width / 8)).

    The first component is the most significant bit; the last byte is filled up with zero bits.
    """
    return np.packbits(np.ascontiguousarray(vectors) > 0, axis=-1)


def to_offset_binary(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Subtract 128 from each byte: 0..255 to -128..127. Not a two's-complement reading of the byte."""
    return (packed.astype(np.int16) - _OFFSET).astype(np.int8)


def byte_rows(vectors: FloatMatrix, encoding: Encoding) -> list[bytes]:
    """One ``bytes`` per vector: little-endian float32, or a byte per 8 components for the binary kinds."""
    if encoding is Encoding.UBINARY:
        return [row.tobytes() for row in pack_bits(vectors)]
    if encoding is Encoding.BINARY:
        return [row.tobytes() for row in to_offset_binary(pack_bits(vectors))]
    return [row.tobytes() for row in vectors.astype("<f4", copy=False)]


def json_rows(vectors: FloatMatrix, encoding: Encoding) -> list[Any]:
    """One JSON value per vector: a base64 string, or a row of numbers that orjson writes from numpy."""
    if encoding is Encoding.BASE64:
        return [b64encode(row).decode("ascii") for row in byte_rows(vectors, encoding)]
    if encoding is Encoding.UBINARY:
        return list(pack_bits(vectors))
    if encoding is Encoding.BINARY:
        return list(to_offset_binary(pack_bits(vectors)))
    return list(np.ascontiguousarray(vectors))

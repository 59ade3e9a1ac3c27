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


def to_int8(vectors: FloatMatrix) -> npt.NDArray[np.int8]:
    """Scale each vector so that its largest component is 127 or -127, and round: (n, width) in one byte each.

    Nothing is cut off and cosines are kept to about a hundredth; lengths are not. A zero vector stays zero.
    """
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    scale = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors * scale).astype(np.int8)


def to_uint8(vectors: FloatMatrix) -> npt.NDArray[np.uint8]:
    """The same plus 128: 1..255."""
    return (to_int8(vectors).astype(np.int16) + _OFFSET).astype(np.uint8)


def byte_rows(vectors: FloatMatrix, encoding: Encoding) -> list[bytes]:
    """One ``bytes`` per vector: little-endian float32, or the bytes of the smaller kinds of numbers."""
    return [row.tobytes() for row in _rows(vectors, encoding.numbers)]


def json_rows(vectors: FloatMatrix, encoding: Encoding) -> list[Any]:
    """One JSON value per vector: a base64 string, or a row of numbers that orjson writes from numpy."""
    if encoding is Encoding.BASE64 or encoding is not encoding.numbers:
        return [b64encode(row).decode("ascii") for row in byte_rows(vectors, encoding)]
    return list(np.ascontiguousarray(_rows(vectors, encoding)))


def _rows(vectors: FloatMatrix, encoding: Encoding) -> npt.NDArray[Any]:
    match encoding:
        case Encoding.UBINARY:
            return pack_bits(vectors)
        case Encoding.BINARY:
            return to_offset_binary(pack_bits(vectors))
        case Encoding.INT8:
            return to_int8(vectors)
        case Encoding.UINT8:
            return to_uint8(vectors)
        case _:
            return vectors.astype("<f4", copy=False)

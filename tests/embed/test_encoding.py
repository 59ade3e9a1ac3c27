"""Encodings against decoders of other hands: struct, plain bit loops and what published clients do."""

from __future__ import annotations

import base64
import math
import struct

import numpy as np
import orjson
import pytest

from services.core.content import Usage
from services.embed.encoding import byte_rows, json_rows, pack_bits, to_int8, to_uint8
from services.embed.rest import response_body, response_items
from services.embed.types import EmbedResult, Encoding

RANDOM = np.random.default_rng(7).standard_normal((3, 384)).astype(np.float32)
EDGES = np.array([[0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, 1e-8, -1e-8]], dtype=np.float32)
MATRICES = [RANDOM, EDGES, RANDOM[:, :1], RANDOM[:, :13], np.asfortranarray(RANDOM), RANDOM[::2, ::-1]]


def on_the_wire(vectors: np.ndarray, *encodings: Encoding) -> list[dict[str, object]]:
    items = response_items(EmbedResult("m", vectors, encodings, Usage(5)), 0, len(vectors))
    return orjson.loads(orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY))


def bits_by_hand(row: np.ndarray) -> list[int]:
    """One int per 8 components, first component in the high bit."""
    values = [1 if x > 0 else 0 for x in row.tolist()]
    values += [0] * (-len(values) % 8)
    return [int("".join(map(str, values[i : i + 8])), 2) for i in range(0, len(values), 8)]


@pytest.mark.parametrize("vectors", MATRICES)
def test_float(vectors: np.ndarray) -> None:
    items = on_the_wire(vectors, Encoding.FLOAT)
    read = np.array([item["embedding"] for item in items], dtype=np.float32)
    assert np.array_equal(read, vectors)


@pytest.mark.parametrize("vectors", MATRICES)
def test_base64_is_little_endian_float32(vectors: np.ndarray) -> None:
    for item, row in zip(on_the_wire(vectors, Encoding.BASE64), vectors, strict=True):
        raw = base64.b64decode(str(item["embedding"]), validate=True)
        assert struct.unpack(f"<{len(row)}f", raw) == tuple(row.tolist())


@pytest.mark.parametrize("vectors", MATRICES)
def test_ubinary(vectors: np.ndarray) -> None:
    for item, row in zip(on_the_wire(vectors, Encoding.UBINARY), vectors, strict=True):
        assert item["embedding"] == bits_by_hand(row)
        assert len(bits_by_hand(row)) == math.ceil(len(row) / 8)


@pytest.mark.parametrize("vectors", MATRICES)
def test_binary_is_offset_by_128(vectors: np.ndarray) -> None:
    for item, row in zip(on_the_wire(vectors, Encoding.BINARY), vectors, strict=True):
        assert item["embedding"] == [byte - 128 for byte in bits_by_hand(row)]
        assert all(type(byte) is int for byte in item["embedding"])  # type: ignore[attr-defined]


def test_binary_as_measured_on_the_hosted_service() -> None:
    signs = [[1 if byte >> shift & 1 else -1 for byte in (50, 193, 128, 255) for shift in range(7, -1, -1)]]
    vectors = np.array(signs, dtype=np.float32)
    assert on_the_wire(vectors, Encoding.UBINARY)[0]["embedding"] == [50, 193, 128, 255]
    assert on_the_wire(vectors, Encoding.BINARY)[0]["embedding"] == [-78, 65, 0, 127]


def test_binary_unpacks_as_llama_index_does() -> None:
    vectors = RANDOM[:1]
    binary = on_the_wire(vectors, Encoding.BINARY)[0]["embedding"]
    unpacked = np.unpackbits((np.array(binary) + 128).astype("uint8"))
    assert unpacked.tolist() == (vectors[0] > 0).astype(int).tolist()


def test_zero_is_not_above_zero() -> None:
    assert pack_bits(EDGES).tolist() == [[0b00101011, 0b00000000]]


@pytest.mark.parametrize("encoding", list(Encoding))
def test_bytes_and_json_say_the_same(encoding: Encoding) -> None:
    for raw, value in zip(byte_rows(RANDOM, encoding), json_rows(RANDOM, encoding), strict=True):
        if isinstance(value, str):
            assert encoding.value.endswith("base64")
            assert raw == base64.b64decode(value)
        else:
            assert raw == np.asarray(value).tobytes()


def test_int8_keeps_what_a_byte_can() -> None:
    whole, signed = to_int8(RANDOM).astype(np.float64), to_uint8(RANDOM).astype(np.int16) - 128
    assert whole.tolist() == signed.tolist()
    assert np.abs(whole).max(axis=1).tolist() == [127] * len(RANDOM)
    # An independent reference: half a step off, at most.
    step = np.abs(RANDOM.astype(np.float64)).max(axis=1, keepdims=True) / 127
    assert (np.abs(whole * step - RANDOM) <= step * 0.5000001).all()
    assert to_int8(np.zeros((1, 3), np.float32)).tolist() == [[0, 0, 0]]


def test_several_encodings_stand_side_by_side() -> None:
    items = on_the_wire(RANDOM, Encoding.BINARY, Encoding.FLOAT, Encoding.BASE64)
    for index, item in enumerate(items):
        assert list(item) == ["object", "index", "embedding", "embeddings_by_type"]
        by_type = item["embeddings_by_type"]
        assert isinstance(by_type, dict)
        assert list(by_type) == ["binary", "float", "base64"]
        assert item["embedding"] == by_type["binary"]
        for encoding, value in by_type.items():
            assert value == on_the_wire(RANDOM, Encoding(encoding))[index]["embedding"]


def test_order_of_keys() -> None:
    result = EmbedResult("m", RANDOM[:2, :1], (Encoding.UBINARY,), Usage(5))
    body = response_body(result, response_items(result, 0, 2))
    text = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    assert text == (
        b'{"model":"m","object":"list","usage":{"total_tokens":5,"prompt_tokens":5},"data":['
        b'{"object":"embedding","index":0,"embedding":[%d]},{"object":"embedding","index":1,"embedding":[%d]}]}'
        % (bits_by_hand(RANDOM[0, :1])[0], bits_by_hand(RANDOM[1, :1])[0])
    )

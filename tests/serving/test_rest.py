"""The REST codec."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.core.errors import ErrorCode, ServiceError
from services.core.serving.rest import decode, encode


def refusal(data: bytes) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        decode(HttpBody(data=data))
    assert refused.value.code is ErrorCode.VALIDATION_ERROR
    return refused.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": NaN}',
        b'{"a": 1} {"b": 2}',
        b'{"a": "\xff\xfe"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\x00"}',
        b"[" * 5000 + b"]" * 5000,
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_told_so(data: bytes) -> None:
    error = refusal(data)
    (entry,) = error.field_errors
    assert (entry.field, entry.type) == ("body", "json_invalid")
    assert error.detail.startswith("Validation error: 'body' is not valid JSON: ")


@pytest.mark.parametrize("data", [b"null", b"1", b'"text"', b"[]", b"true", b"[" * 100 + b"]" * 100])
def test_other_json_than_an_object_is_refused(data: bytes) -> None:
    (entry,) = refusal(data).field_errors
    assert (entry.field, entry.type) == ("body", "dict_type")


def test_any_content_type_is_taken() -> None:
    for content_type in ("", "application/json; charset=utf-8", "text/plain"):
        assert decode(HttpBody(content_type=content_type, data=b'{"a": 1}')) == {"a": 1}


def test_escaped_nul_and_a_hundred_levels_are_json() -> None:
    assert decode(HttpBody(data=b'{"a": "\\u0000"}')) == {"a": "\0"}
    nested = b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"
    assert list(decode(HttpBody(data=nested))) == ["a"]


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_refusal(data: bytes) -> None:
    try:
        parsed = decode(HttpBody(data=data))
    except ServiceError as error:
        refused = error.code
        assert refused is ErrorCode.VALIDATION_ERROR
    else:
        assert isinstance(parsed, dict)


@given(arrays.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_float32_reads_back_as_the_same_float32(vector: np.ndarray) -> None:
    read = np.array(orjson.loads(encode({"embedding": vector}).data)["embedding"], dtype=np.float64)
    assert (read.astype(np.float32) == vector).all()


def test_float32_is_written_with_its_shortest_digits_and_keys_in_order() -> None:
    vector = np.array([0.1, -0.034478, 1e-8], dtype=np.float32)
    body = encode({"z": vector, "a": "ä"})
    assert body.content_type == "application/json"
    assert body.data == '{"z":[0.1,-0.034478,1e-8],"a":"ä"}'.encode()

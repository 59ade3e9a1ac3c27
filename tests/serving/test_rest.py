"""The REST codec."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.core.errors import ErrorCode, ServiceError
from services.core.requests.limits import MAX_STRING_BYTES, RequestLimits
from services.core.serving.bodies import SMALL_BYTES, VALUE_BYTES, Bodies, Hold
from services.core.serving.rest import Body, decode, encode, raw_items

VALUES = 40_000


def body(data: bytes, hold: Hold = lambda _: None) -> Body:
    limits = RequestLimits(text=64 << 20, other=64 << 20, values=VALUES, together=64 << 20)
    return Body(memoryview(data), Bodies(limits), "somebody", hold)


def parsed(data: bytes) -> Any:
    return asyncio.run(decode(body(data)))


def refusal(data: bytes) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        parsed(data)
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
        b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-16-be"),
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


def test_a_byte_order_mark_is_taken_and_utf_16_is_named() -> None:
    assert parsed(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert "UTF-16" in refusal('{"a": 1}'.encode("utf-16")).detail


def test_escaped_nul_and_a_hundred_levels_are_json() -> None:
    assert parsed(b'{"a": "\\u0000"}') == {"a": "\0"}
    nested = b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"
    assert list(parsed(nested)) == ["a"]


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_refusal(data: bytes) -> None:
    try:
        value = parsed(data)
    except ServiceError as error:
        code = error.code
        assert code is ErrorCode.VALIDATION_ERROR
    else:
        assert isinstance(value, dict)


@given(arrays.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_float32_reads_back_as_the_same_float32(vector: np.ndarray) -> None:
    read = np.array(orjson.loads(encode({"embedding": vector}).data)["embedding"], dtype=np.float64)
    assert (read.astype(np.float32) == vector).all()


def test_float32_is_written_with_its_shortest_digits_and_keys_in_order() -> None:
    vector = np.array([0.1, -0.034478, 1e-8], dtype=np.float32)
    body = encode({"z": vector, "a": "ä"})
    assert body.content_type == "application/json"
    assert body.data == '{"z":[0.1,-0.034478,1e-8],"a":"ä"}'.encode()


LARGE = 3 * SMALL_BYTES
TEXT = 'a text, with [brackets]: {braces} "quotes" \\ é 😀\n' * 50


@pytest.mark.parametrize(
    "value",
    [
        {"input": [TEXT] * 100},
        {"documents": [{"text": TEXT, "n": [1, 2.5, None, {}]}] * 100, "junk": [[]] * 5000, "": {"": ""}},
        {"a": {"b": {"c": [TEXT * 100, {"d": TEXT * 100}]}}, "e": TEXT * 100, "f": [], "g": {}, "h": [[]]},
        {f"{TEXT}{i}": i for i in range(500)},
        {"a": [1] * 30_000},
    ],
)
@pytest.mark.parametrize("option", [0, orjson.OPT_INDENT_2])
def test_a_large_body_is_read_as_the_parser_reads_it(value: Any, option: int) -> None:
    data = orjson.dumps(value, option=option)
    data += b" " * max(0, SMALL_BYTES + 1 - len(data))
    read = parsed(data)
    assert read == value
    assert list(read) == list(value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": ["', "unexpected end of data"),
        (b'{"a": [', "unexpected end of data"),
        (b'{"a": [{}]}}', "unexpected content after document"),
        (b'{"a": [1,,2]}', "unexpected character"),
        (b'{"a": [1,\x0b2]}', "unexpected character"),
        (b'{"a": [1,2],}', "trailing comma"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a" 1}', "unexpected character"),
    ],
)
def test_a_large_body_that_is_not_json_is_told_where(data: bytes, problem: str) -> None:
    start = b'{"z":\n"' + b"z" * LARGE + b'",\n'
    detail = refusal(start + data[1:]).detail
    assert "'body' is not valid JSON: " in detail
    assert problem in detail
    # Of bytes that are no UTF-8 the parser tells no place; it is that of the part.
    assert f"(line {2 if problem == 'UTF-8' else 3}, column " in detail


@pytest.mark.parametrize("start", [b"[", b"", b'["', b"  "])
def test_a_large_body_that_is_no_object_is_told_so(start: bytes) -> None:
    (entry,) = refusal(start + b"1, " * (LARGE // 16) + b" " * LARGE).field_errors
    assert (entry.field, entry.type) == ("body", "dict_type")


@pytest.mark.parametrize("value", [b"{}", b"[]", b'""', b"1"])
def test_a_body_of_too_many_values_is_refused(value: bytes) -> None:
    within = b'{"junk":[' + b",".join([value] * (VALUES // 2 - 2)) + b" " * LARGE + b"]}"
    assert len(parsed(within)["junk"]) == VALUES // 2 - 2
    beyond = b'{"junk":[' + b",".join([value] * 2 * VALUES) + b"]}"
    (entry,) = refusal(beyond).field_errors
    assert (entry.field, entry.type) == ("body", "too_many_values")


def test_a_string_longer_than_any_model_reads_is_refused() -> None:
    (entry,) = refusal(b'{"input":"' + b"a" * (MAX_STRING_BYTES + LARGE) + b'"}').field_errors
    assert (entry.field, entry.type) == ("body", "string_too_long")
    assert len(parsed(b'{"input":"' + b"a" * MAX_STRING_BYTES + b'"}')["input"]) == MAX_STRING_BYTES


WIDE = ("😀", r"\ud83d\ude00", "語", r"\u8a9e", "é")


@pytest.mark.parametrize(("wide", "width"), [*zip(WIDE, (4, 4, 2, 2, 1), strict=True)])
@pytest.mark.parametrize(("length", "count"), [(600_000, 1), (30_000, 20)])
def test_what_wide_characters_take_in_memory_is_counted(
    wide: str, width: int, length: int, count: int
) -> None:
    held: list[int] = []
    data = f'{{"input":[{",".join([chr(34) + "a" * length + wide + chr(34)] * count)}]}}'.encode()
    fields = asyncio.run(decode(body(data, held.append)))
    assert fields == orjson.loads(data)
    more = (width - 1) * length * count + VALUE_BYTES * count
    assert 0.99 * more <= sum(held) <= 1.01 * more + 3 * VALUE_BYTES


@pytest.mark.parametrize(
    "values",
    [
        [[]] * 12_000,
        [{}] * 12_000,
        [[[1]]] * 9_000,
        [1.5] * 12_000,
        [f"é{number}" for number in range(12_000)],
        [{"a": 1}] * 12_000,
        [{"text": str(number)} for number in range(12_000)],
        [{f"k{number}": f"é{number}"} for number in range(12_000)],
        {f"k{number}": number for number in range(12_000)},
        [{f"k{number}": number for number in range(6)}] * 2_500,
    ],
    ids=lambda values: orjson.dumps(values)[:12].decode(),
)
def test_what_many_small_values_take_in_memory_is_counted(values: Any) -> None:
    """At the peak, with where they stand in the body, and no more than five times as much."""
    held: list[int] = []
    sent = {"junk": values, "text": "x" * LARGE}
    data = orjson.dumps(sent)
    tracemalloc.start()
    try:
        fields = asyncio.run(decode(body(data, held.append)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert fields == sent
    assert sum(held) / 5 < peak < sum(held) + len(data)


def test_a_string_that_takes_more_memory_than_any_may_is_refused() -> None:
    (entry,) = refusal(b'{"input":"' + b"a" * (MAX_STRING_BYTES // 4) + "😀".encode() + b'"}').field_errors
    assert (entry.field, entry.type) == ("body", "string_too_long")


def test_a_call_whose_texts_take_more_than_all_may_hold_is_refused_for_good() -> None:
    bodies = Bodies(RequestLimits(text=100, other=100, values=1, together=100))
    bodies.enter(40)
    bodies.enter(40, 40)
    with pytest.raises(ServiceError) as refused:
        bodies.enter(30, 80)
    assert refused.value.code is ErrorCode.VALIDATION_ERROR
    with pytest.raises(ServiceError) as refused:
        bodies.enter(30, 10)
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE


def test_other_work_runs_between_the_parts_of_a_large_body() -> None:
    async def count() -> int:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        await decode(body(orjson.dumps({"input": ["x" * 1000] * 5000})))
        beside.cancel()
        return turns

    assert asyncio.run(count()) > 50


def test_the_bytes_of_each_item_are_found_as_they_came() -> None:
    async def sent(data: bytes) -> list[bytes]:
        kept = body(data)
        await decode(kept, keep=True)
        return [bytes(item) for item in await raw_items(kept, "documents")]

    data = b'{"documents":[0],"n":{"documents":[9]},"documents": [ {"id": 12345678901234567890123} , "a,b" ]}'
    assert asyncio.run(sent(data)) == [b' {"id": 12345678901234567890123} ', b' "a,b" ']
    for other in (b"{}", b'{"documents":[]}', b'{"documents":{"a":[1]}}', b'{"documents":"x","a":[1]}'):
        assert asyncio.run(sent(other)) == []

"""Cutting inputs into chunks, whatever pieces they come in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batch.inputs import MAX_CHUNK_LINES, TooManyLines, cut
from services.batch.lines import DUPLICATE, MAX_LINE_BYTES, TOO_LONG, split_lines
from services.batch.table import Plan


async def _cut(data: bytes, piece: int = 1 << 16, tokens: int = 25, most: int = 50_000) -> list[Plan]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), piece):
            yield data[start : start + piece]

    return await cut(pieces(), chunk_tokens=tokens, max_lines=most)


def _line(name: object, words: int = 1) -> bytes:
    return json.dumps({"custom_id": name, "body": {"input": "word " * words}}).encode()


@given(
    st.lists(st.one_of(st.integers(0, 30).map(str).map(_line), st.sampled_from([b"", b" ", b"x", b"{}"]))),
    st.integers(1, 50),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.booleans(),
)
async def test_every_line_is_in_one_chunk_in_order(
    lines: list[bytes], piece: int, end: bytes, mark: bytes, last: bool
) -> None:
    data = mark + end.join(lines) + (end if last else b"")
    plans = await _cut(data, piece)
    assert plans == await _cut(data)
    found = [split_lines(data[plan.start : plan.start + plan.length], plan.place) for plan in plans]
    assert [(place, line.removesuffix(b"\r")) for chunk in found for place, line in chunk] == [
        (place, line) for place, line in enumerate(lines, 1) if line.strip()
    ]
    assert [len(chunk) for chunk in found] == [plan.lines for plan in plans]
    first = 0
    for plan in plans:
        assert plan.first == first
        assert plan.lines == 1 or plan.length <= 100
        first += plan.lines


async def test_repeated_ids_are_found_across_chunks() -> None:
    names = ["a", "b", "a", 1, 1, None, None, "b"]
    plans = await _cut(b"\n".join(map(_line, names)))
    found = {plan.first + place: fault for plan in plans for place, fault in plan.faults.items()}
    assert len(plans) > 1
    assert found == {2: f"{DUPLICATE}:1", 7: f"{DUPLICATE}:2"}


async def test_a_line_that_is_too_long_is_not_kept() -> None:
    long = _line("long", MAX_LINE_BYTES)
    plans = await _cut(b"\n".join([_line("a"), long, _line("b")]))
    assert [(plan.first, plan.lines, plan.faults) for plan in plans] == [
        (0, 1, {}),
        (1, 1, {0: TOO_LONG}),
        (2, 1, {}),
    ]
    assert plans[1].length == 0


async def test_chunks_have_a_bounded_number_of_lines() -> None:
    plans = await _cut(b"{}\n" * 1_000, tokens=10_000)
    assert max(plan.lines for plan in plans) == MAX_CHUNK_LINES
    assert sum(plan.lines for plan in plans) == 1_000


async def test_who_watches_sees_small_jobs_move_as_well() -> None:
    """No chunk is more than an eighth of what is before it, until the operator's size is reached."""
    plans = await _cut(b"\n".join(_line(f"c{n}") for n in range(30_000)), tokens=10_000)
    sizes = [plan.length for plan in plans]
    assert all(size <= max(4096, plan.start // 8) for size, plan in zip(sizes, plans, strict=True))
    small = [size for size, plan in zip(sizes, plans, strict=True) if plan.start < 1 << 17]
    assert len(small) > 16


async def test_fifty_thousand_lines_and_one_more() -> None:
    data = b"{}\n" * 50_000
    assert sum(plan.lines for plan in await _cut(data)) == 50_000
    with pytest.raises(TooManyLines):
        await _cut(data + b"{}")


async def test_nothing_is_no_chunk() -> None:
    assert await _cut(b"") == []
    assert await _cut(b"\n \n\r\n") == []

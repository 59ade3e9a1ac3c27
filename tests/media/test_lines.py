"""Lines out of pieces of any size."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.core.media.decoding import gunzipped
from services.core.media.lines import TextLine, read_lines


async def pieces(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def lines_of(*parts: bytes, limit: int = 100) -> list[TextLine]:
    return [line async for line in read_lines(pieces(parts), limit)]


async def test_lines_over_the_edges_of_pieces() -> None:
    assert await lines_of(b"on", b"e\ntw", b"o\r", b"\n\n  \n", b"five") == [
        TextLine(1, 0, 3, b"one"),
        TextLine(2, 4, 3, b"two"),
        TextLine(5, 13, 4, b"five"),
    ]


async def test_nothing_gives_no_line() -> None:
    assert await lines_of() == []
    assert await lines_of(b"", b"\n", b"\r\n") == []


async def test_the_byte_order_mark_goes() -> None:
    assert await lines_of(b"\xef\xbb", b"\xbfone\n\xef\xbb\xbftwo") == [
        TextLine(1, 3, 3, b"one"),
        TextLine(2, 7, 6, b"\xef\xbb\xbftwo"),
    ]


async def test_a_line_that_is_too_long_is_cut_and_the_next_is_whole() -> None:
    assert await lines_of(b"12345\r\n123456\n1234567", b"89\n12345\n", limit=5) == [
        TextLine(1, 0, 5, b"12345"),
        TextLine(2, 7, 6, b"12345", too_long=True),
        TextLine(3, 14, 9, b"12345", too_long=True),
        TextLine(4, 24, 5, b"12345"),
    ]


async def test_a_line_without_end_is_not_kept() -> None:
    tracemalloc.start()
    try:
        found = await lines_of(*[b"x" * 65536] * 1000, limit=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [TextLine(1, 0, 65_536_000, b"x" * 1000, too_long=True)]
    assert peak < 1 << 20


@given(
    st.one_of(st.binary(max_size=200), st.text("a \r\n\ufeff", max_size=200).map(str.encode)),
    st.lists(st.integers(0, 200), max_size=8),
)
async def test_the_edges_of_pieces_change_nothing(content: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    parts = [content[a:b] for a, b in pairwise(edges)]
    split = await lines_of(*parts, limit=20)
    assert split == await lines_of(content, limit=20)
    expected = [
        (number, line.removesuffix(b"\r")[:20])
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        if line.strip() or len(line.removesuffix(b"\r")) > 20
    ]
    assert [(line.number, line.data) for line in split] == expected
    for line in split:
        assert content[line.start : line.start + line.length][:20] == line.data
        assert line.too_long == (line.length > 20)


async def test_short_streams_are_no_gzip() -> None:
    for content in (b"", b"\x1f", b"a", b"ab"):
        assert b"".join([part async for part in gunzipped(pieces([content]), 10)]) == content

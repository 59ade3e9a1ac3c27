"""Lines of a stream of bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line without its end; ``number`` counts from 1. A line that is ``too_long`` is cut.

    ``start`` and ``length`` say where all of it lies in the stream, in bytes.
    """

    number: int
    start: int
    length: int
    data: bytes
    too_long: bool = False


async def read_lines(chunks: AsyncIterable[bytes], max_line_bytes: int) -> AsyncGenerator[TextLine]:
    """Give the lines of ``chunks`` that are not blank, holding one line and one chunk at most."""
    held = _Held(max_line_bytes)
    async for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            held.add(chunk, start, end)
            start = end + 1
            if (line := held.take()) is not None:
                yield line
        held.add(chunk, start, len(chunk))
    if (line := held.take()) is not None:
        yield line


class _Held:
    """The line being put together, never kept longer than is allowed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._number = 0
        self._start = 0
        self._length = 0

    def add(self, chunk: bytes, start: int, end: int) -> None:
        self._length += end - start
        # A byte order mark and a carriage return are cut later: as many more bytes are kept.
        room = self._limit + len(_BOM) + 1 - len(self._data)
        self._data += memoryview(chunk)[start : min(end, start + room)]

    def take(self) -> TextLine | None:
        """End the line; None if it is blank."""
        start, length, data = self._start, self._length, bytes(self._data)
        whole = length == len(data)
        self._start += length + 1
        self._length = 0
        self._data.clear()
        self._number += 1
        if self._number == 1 and data.startswith(_BOM):
            data = data.removeprefix(_BOM)
            start, length = start + len(_BOM), length - len(_BOM)
        if whole and data.endswith(b"\r"):
            data, length = data[:-1], length - 1
        too_long = length > self._limit
        if not too_long and not data.strip():
            return None
        return TextLine(self._number, start, length, data[: self._limit], too_long)

"""Lines of a stream of bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end; ``number`` counts from 1. A line that is ``too_long`` is cut."""

    number: int
    data: bytes
    too_long: bool = False


async def read_lines(chunks: AsyncIterable[bytes], max_line_bytes: int) -> AsyncIterator[Line]:
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
    """The line being put together, never longer than is allowed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._too_long = False
        self._number = 0

    def add(self, chunk: bytes, start: int, end: int) -> None:
        # One more byte than allowed is kept, for a carriage return that is cut later.
        room = self._limit + 1 - len(self._data)
        if end - start > room:
            self._too_long = True
            end = start + room
        self._data += memoryview(chunk)[start:end]

    def take(self) -> Line | None:
        """End the line; None if it is blank."""
        self._number += 1
        data = bytes(self._data)
        too_long, self._too_long = self._too_long, False
        self._data.clear()
        if self._number == 1:
            data = data.removeprefix(_BOM)
        if not too_long:
            data = data.removesuffix(b"\r")
        if len(data) > self._limit:
            data, too_long = data[: self._limit], True
        return Line(self._number, data, too_long) if too_long or data.strip() else None

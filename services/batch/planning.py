"""Cutting a job's input into chunks, and finding what only a look at all of it can find."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from services.batch.lines import DUPLICATE, MAX_LINE_BYTES, TOO_LONG, custom_id_of
from services.batch.table import Plan
from services.core.inference.submission import CHARACTERS_PER_TOKEN
from services.core.media.lines import TextLine, read_lines

MAX_CHUNK_LINES = 256

_LEAST_BYTES = 4096
_STEPS = 8
"""A chunk is at most this part of what stands before it in its input, or ``_LEAST_BYTES``."""

_PAUSE = 256
"""Lines read before the event loop gets its turn."""


class TooManyLines(Exception):  # noqa: N818 - told to the caller, no failure of ours
    """The input has more lines than a job may have."""


async def cut(pieces: AsyncIterator[bytes], *, chunk_tokens: int, max_lines: int) -> list[Plan]:
    """Plan the chunks of an input that comes in ``pieces``, in memory for its line names only.

    The same input gives the same plan. Raises ``TooManyLines``.
    """
    planner = _Planner(chunk_tokens)
    count = 0
    async with aclosing(read_lines(pieces, MAX_LINE_BYTES)) as lines:
        async for line in lines:
            count += 1
            if count > max_lines:
                raise TooManyLines
            planner.add(line)
            if count % _PAUSE == 0:
                await asyncio.sleep(0)
    return planner.finish()


class _Planner:
    """Puts one line after the other into the open chunk, and closes it when it is full."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_bytes = chunk_tokens * CHARACTERS_PER_TOKEN
        self._seen: dict[bytes, int] = {}
        self._plans: list[Plan] = []
        self._first = self._place = 0
        self._lines = self._start = self._end = 0
        self._faults: dict[int, str] = {}

    def add(self, line: TextLine) -> None:
        if line.too_long:
            self._close()
            # Nobody has to read it again: its chunk has no bytes.
            self._append(1, line.start, 0, {0: TOO_LONG}, line.number)
            return
        end = line.start + line.length
        if end - self._start > self._room() or self._lines >= MAX_CHUNK_LINES:
            self._close()
        if not self._lines:
            self._start, self._place = line.start, line.number
        if (earlier := self._earlier(line)) is not None:
            self._faults[self._lines] = f"{DUPLICATE}:{earlier}"
        self._lines += 1
        self._end = end

    def _room(self) -> int:
        """Bytes of the open chunk: few at first, so that who watches a small job sees it move as well."""
        return min(self._chunk_bytes, max(_LEAST_BYTES, self._start // _STEPS))

    def finish(self) -> list[Plan]:
        self._close()
        return self._plans

    def _close(self) -> None:
        if self._lines:
            self._append(self._lines, self._start, self._end - self._start, self._faults, self._place)
            self._lines, self._faults = 0, {}

    def _append(self, lines: int, start: int, length: int, faults: Mapping[int, str], place: int) -> None:
        self._plans.append(Plan(self._first, lines, start, length, faults, place))
        self._first += lines

    def _earlier(self, line: TextLine) -> int | None:
        """Give the place of the line that had this one's name before it."""
        custom_id = custom_id_of(line.data)
        if custom_id is None:
            return None
        name = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._seen.setdefault(name, line.number)
        return None if earlier == line.number else earlier

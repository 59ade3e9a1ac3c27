"""Cutting a job's input into chunks, and finding what only a look at all of it can find."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from services.batch.lines import DUPLICATE, MAX_LINE_BYTES, TOO_LONG, custom_id_of
from services.batch.table import Plan
from services.core.inference.embedding import CHARACTERS_PER_TOKEN

MAX_CHUNK_LINES = 256

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
    async for start, length, line in _lines(pieces):
        if line is not None and not line.strip():
            continue
        count += 1
        if count > max_lines:
            raise TooManyLines
        planner.add(start, length, line)
        if count % _PAUSE == 0:
            await asyncio.sleep(0)
    return planner.finish()


class _Planner:
    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_bytes = chunk_tokens * CHARACTERS_PER_TOKEN
        self._plans: list[Plan] = []
        self._seen: set[bytes] = set()
        self._open = Plan(0, 0, 0, 0, {})

    def add(self, start: int, length: int, line: bytes | None) -> None:
        """Add a line of ``length`` bytes at ``start``; None stands for one that is too long to be kept."""
        if line is None:
            self._close()
            first = self._open.first
            # Nobody has to read it again: the chunk has no bytes.
            self._plans.append(Plan(first, 1, start, 0, {0: TOO_LONG}))
            self._open = Plan(first + 1, 0, 0, 0, {})
            return
        plan = self._open
        if plan.lines and (start + length - plan.start > self._chunk_bytes or plan.lines >= MAX_CHUNK_LINES):
            self._close()
            plan = self._open
        faults = dict(plan.faults)
        if self._is_duplicate(line):
            faults[plan.lines] = DUPLICATE
        begin = plan.start if plan.lines else start
        self._open = Plan(plan.first, plan.lines + 1, begin, start + length - begin, faults)

    def finish(self) -> list[Plan]:
        self._close()
        return self._plans

    def _close(self) -> None:
        plan = self._open
        if plan.lines:
            self._plans.append(plan)
            self._open = Plan(plan.first + plan.lines, 0, 0, 0, {})

    def _is_duplicate(self, line: bytes) -> bool:
        custom_id = custom_id_of(line)
        if custom_id is None:
            return False
        name = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if name in self._seen:
            return True
        self._seen.add(name)
        return False


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, int, bytes | None]]:
    """Give start, length and bytes of each line, None for the bytes of one that is too long."""
    rest = bytearray()
    start = 0  # of the line that ``rest`` begins, of which ``dropped`` bytes were let go already
    dropped = 0
    async for piece in pieces:
        begin = 0
        while (end := piece.find(b"\n", begin)) >= 0:
            yield _line(start, dropped, rest, piece[begin:end])
            start += dropped + len(rest) + end - begin + 1
            rest, dropped, begin = bytearray(), 0, end + 1
        rest += piece[begin:]
        if len(rest) > MAX_LINE_BYTES:
            dropped += len(rest)
            rest.clear()
    if rest or dropped:
        yield _line(start, dropped, rest, b"")


def _line(start: int, dropped: int, rest: bytearray, last: bytes) -> tuple[int, int, bytes | None]:
    length = dropped + len(rest) + len(last)
    if length > MAX_LINE_BYTES:
        return start, length, None
    return start, length, bytes(rest) + last

"""Gzip undone piece by piece, within a bound on what comes out."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from services.core.media.errors import FetchError

_MAGIC = b"\x1f\x8b"
_PIECE = 256 << 10


def _member() -> Any:
    return zlib.decompressobj(wbits=31)


class Gunzip:
    """Decodes gzip of one or several members; holds at most one piece of output."""

    def __init__(self) -> None:
        self._member = _member()
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode ``data`` into pieces of at most 256 KiB; FetchError if it is not gzip."""
        while data:
            self._begun = True
            try:
                piece = self._member.decompress(data, _PIECE)
            except zlib.error as error:
                raise FetchError("its content is not valid gzip", retryable=False) from error
            if self._member.eof:
                # What follows is another member, or the zeros that some tools pad with.
                data = self._member.unused_data.lstrip(b"\0")
                self._member, self._begun = _member(), False
            else:
                data = self._member.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        """Say that no more comes; FetchError in the middle of a member."""
        if self._begun:
            raise FetchError("its gzip content breaks off", retryable=True)


async def decoded(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """Decode gzip ``chunks``; FetchError once more than ``max_bytes`` come out."""
    gunzip = Gunzip()
    total = 0
    async for chunk in chunks:
        for piece in gunzip.feed(chunk):
            total += len(piece)
            if total > max_bytes:
                raise FetchError(f"it unpacks to more than {max_bytes:,} bytes", retryable=False)
            yield piece
            # A little gzip unpacks to much: others on the loop have their turn in between.
            await asyncio.sleep(0)
    gunzip.finish()


async def bounded(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """Hand ``chunks`` on; FetchError once they are more than ``max_bytes``."""
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if total > max_bytes:
            raise FetchError(f"it is larger than {max_bytes:,} bytes", retryable=False)
        yield chunk


async def gunzipped(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """Decode ``chunks`` if they begin as gzip does, which no text does; else hand them on.

    FetchError once more than ``max_bytes`` come in or out.
    """
    head = b""
    async with aclosing(bounded(chunks, max_bytes)) as source:
        async for chunk in source:
            head += chunk
            if len(head) >= len(_MAGIC):
                break
        whole = _joined(head, source)
        async with aclosing(decoded(whole, max_bytes) if head.startswith(_MAGIC) else whole) as pieces:
            async for piece in pieces:
                yield piece


async def _joined(head: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    if head:
        yield head
    async for chunk in rest:
        yield chunk

"""From media as callers sent them to pixels: fetched, recognised, decoded, all of it within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple
from functools import partial
from typing import Any

from services.core.call import Call
from services.core.catalog.types import Modality
from services.core.content import Fit, Image, Media, Scaling, Square
from services.core.cores import usable_cores
from services.core.media.budget import ByteBudget
from services.core.media.connecting import Resolver, resolve
from services.core.media.decoders import Decoders
from services.core.media.errors import FetchError, MediaError
from services.core.media.fetching import Fetcher, Limits, shown
from services.core.media.scaling import Scaler
from services.core.media.sniffing import Found, sniff
from services.core.media.sources import expected_bytes, is_url, read_inline
from services.core.settings import Settings

_AT_ONCE = 8
"""Files of one call that are fetched or decoded at a time: one call must not fill the room."""

_MAX_ASPECT = 200
"""Of the longer side to the shorter; beyond it a picture is scaled to next to nothing, or to gigabytes."""

_MAX_DECODERS = 8
_SERVED = frozenset({"JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"})
_NAMES = {Modality.IMAGE: "image", Modality.PDF: "PDF"}
_IN_THREAD_BYTES = 1 << 16


class MediaRoom:
    """See ``services.core.content.Opener`` for the contract; one per process, on its loop.

    Decoding processes are started with the first media. A process that is lost costs the file it was at.
    """

    def __init__(self, settings: Settings, *, resolver: Resolver = resolve) -> None:
        self._settings = settings
        seconds = settings.media_fetch_seconds
        self._fetcher = Fetcher(
            settings,
            limits=Limits(connect_seconds=min(10.0, seconds), idle_seconds=seconds, total_seconds=seconds),
            resolver=resolver,
        )
        cores = settings.cores or usable_cores()
        self.decoders = Decoders(
            settings.media_decoders or min(_MAX_DECODERS, cores),
            memory_bytes=settings.media_decoder_memory_bytes,
            cpu_seconds=settings.media_decoder_seconds,
        )
        self.budget = ByteBudget(settings.media_bytes_in_flight)
        self._scaler = Scaler(self.decoders.count)

    @asynccontextmanager
    async def open(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, call: Call
    ) -> AsyncGenerator[list[tuple[Image, ...]]]:
        """Fetch and decode; see ``Opener.open``."""
        if not named:
            yield []
            return
        async with self.budget.reserved(self._expected(named, fit)) as reservation:
            opened = await self._all(named, fit)
            reservation.shrink(sum(image.pixels.nbytes for images in opened for image in images))
            yield opened

    async def aclose(self) -> None:
        """End the decoding processes and close the connections."""
        await self.decoders.aclose()
        self._scaler.close()
        await self._fetcher.aclose()

    async def _all(self, named: Sequence[tuple[str, Media]], fit: Fit | None) -> list[tuple[Image, ...]]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str, media: Media) -> tuple[Image, ...]:
            async with turns:
                try:
                    return await self._open(media, fit)
                except MediaError as error:
                    raise error.of(f"The {_NAMES[media.kind]} of {name}") from error

        tasks: list[asyncio.Task[tuple[Image, ...]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(name, media)) for name, media in named]
        except BaseExceptionGroup as failures:
            # The others were cancelled; of several that failed together, the first is told.
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _open(self, media: Media, fit: Fit | None) -> tuple[Image, ...]:
        data = await self._read(media.source)
        _check_kind(sniff(data), media.kind)
        finish = partial(self._scaler.scaled, fit) if isinstance(fit, Scaling) else None
        return tuple(await self.decoders.decode(data, self._rules(media.kind, fit), finish))

    async def _read(self, source: str | bytes) -> bytes:
        limit = self._settings.media_max_bytes
        if isinstance(source, bytes):
            if len(source) > limit:
                raise MediaError(f"it is larger than {limit:,} bytes")
            if not source:
                raise MediaError("it is empty")
            return source
        if is_url(source):
            try:
                return await self._fetcher.read(source, max_bytes=limit)
            except FetchError as error:
                raise MediaError(f"fetching '{shown(source)}' failed: {error.cause}") from error
        if len(source) > _IN_THREAD_BYTES:
            return await asyncio.to_thread(read_inline, source, limit)
        return read_inline(source, limit)

    def _rules(self, kind: Modality, fit: Fit | None) -> dict[str, Any]:
        settings = self._settings
        return {
            "kind": str(kind),
            "max_pixels": settings.media_max_pixels,
            "max_pages_pixels": settings.media_max_pixels if fit is None else 0,
            "max_aspect": _MAX_ASPECT,
            "max_pages": settings.media_max_pages,
            "upright": settings.media_upright,
            "fit": astuple(fit) if isinstance(fit, Square) else None,
        }

    def _expected(self, named: Sequence[tuple[str, Media]], fit: Fit | None) -> int:
        """Return at most how many bytes media will take: the largest files in hand at a time, all pixels.

        Beside them each decoding process may have given one picture that is not scaled yet.
        """
        limit = self._settings.media_max_bytes
        files = sorted((min(_file_bytes(media.source, limit), limit) for _, media in named), reverse=True)
        image = 3 * _pixels(fit, self._settings.media_max_pixels)
        pages = sum(self._settings.media_max_pages if media.kind is Modality.PDF else 1 for _, media in named)
        return sum(files[:_AT_ONCE]) + image * pages


def _pixels(fit: Fit | None, most: int) -> int:
    """Return at most how many pixels a picture of up to ``most`` has when it is fitted."""
    if fit is None:
        return most
    return fit.side**2 if isinstance(fit, Square) else fit.max_pixels


def _file_bytes(source: str | bytes, limit: int) -> int:
    if isinstance(source, bytes):
        return len(source)
    return limit if is_url(source) else expected_bytes(source)


def _check_kind(found: Found, kind: Modality) -> None:
    """Raise MediaError unless a file of what was found can be read in a field of ``kind``."""
    if found.kind != kind:
        was = f"it is {found.name}" if found.kind != "unknown" else "its format is not known"
        raise MediaError(f"{was}, not {'an' if kind is Modality.IMAGE else 'a'} {_NAMES[kind]}")
    if kind is Modality.IMAGE and found.name not in _SERVED:
        raise MediaError(f"{found.name} is not read; send {', '.join(sorted(_SERVED))}")

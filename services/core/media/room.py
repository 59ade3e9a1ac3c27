"""From media as callers sent them to pixels: fetched, recognised, decoded, all of it within bounds."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call, Timings
from services.core.catalog.types import Modality
from services.core.content import (
    SOUND_RATE,
    SOUND_SECONDS,
    Film,
    Fit,
    Image,
    Media,
    Opened,
    Scaling,
    Sound,
    Square,
)
from services.core.cores import usable_cores
from services.core.media.budget import ByteBudget, Reservation
from services.core.media.connecting import Resolver, resolve
from services.core.media.decoders import Decoders, Head
from services.core.media.errors import FetchError, MediaError
from services.core.media.fetching import Fetcher, FetchLimits, shown
from services.core.media.metrics import BYTES, BYTES_LIMIT, DECODE_SECONDS, FETCHES
from services.core.media.scaling import Scaler
from services.core.media.sniffing import CONTAINERS, EITHER, Found, sniff
from services.core.media.sources import expected_bytes, is_url, read_inline
from services.core.settings import Settings

_AT_ONCE = 8
"""Files of one call that are fetched or decoded at a time: one call must not fill the room."""

_MAX_ASPECT = 200
"""Of the longer side to the shorter; beyond it a picture is scaled to next to nothing, or to gigabytes."""

_MAX_DECODERS = 8
_SERVED = frozenset({"JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"})
_NAMES = {
    Modality.IMAGE: "image",
    Modality.PDF: "PDF",
    Modality.AUDIO: "audio",
    Modality.VIDEO: "video",
}
_STREAMS = frozenset({Modality.AUDIO, Modality.VIDEO})
_IN_THREAD_BYTES = 1 << 16
_PIXEL_BYTES = 3
_SOUND_BYTES = 4 * SOUND_RATE * SOUND_SECONDS
_FRAMES = 32


class MediaRoom:
    """See ``services.core.content.Opener`` for the contract; one per process, on its loop.

    Decoding processes are started with the first media. A process that is lost costs the file it was at.
    """

    def __init__(self, settings: Settings, *, resolver: Resolver = resolve) -> None:
        self._settings = settings
        seconds = settings.media_fetch_seconds
        self._fetcher = Fetcher(
            settings,
            limits=FetchLimits(
                connect_seconds=min(10.0, seconds), idle_seconds=seconds, total_seconds=seconds
            ),
            resolver=resolver,
        )
        cores = settings.cores or usable_cores()
        self.decoders = Decoders(
            settings.media_decoders or min(_MAX_DECODERS, cores),
            memory_bytes=settings.media_decoder_memory_bytes,
        )
        # Two budgets share one bound. In the first are the files of calls and what has become of them, up to
        # the end of their passes; in the second pictures, pages and frames that are being decoded and scaled.
        # Whoever has room in the second waits for nothing but a processor, so calls that hold some of the
        # first may wait for it.
        whole = settings.media_bytes_in_flight
        pixels = min(_PIXEL_BYTES * settings.media_max_pixels, whole // 2)
        self.budget = ByteBudget(whole - pixels)
        self.pixels = ByteBudget(pixels)
        self._scaler = Scaler(self.decoders.count)
        files, decoding = self.budget, self.pixels
        BYTES.set_function(lambda: files.held + decoding.held)
        BYTES_LIMIT.set(whole)

    @asynccontextmanager
    async def open(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, call: Call
    ) -> AsyncGenerator[Opening]:
        """Fetch and decode; see ``Opener.open``."""
        stages = _Stages(call.timings)
        began = time.monotonic()
        reservation = await self.budget.reserve(self._expected(named, fit))
        call.timings.queue += time.monotonic() - began
        opening = Opening(reservation, _sent_bytes(named))
        try:
            opening.fill(await self._all(named, fit, stages), fit)
            yield opening
        finally:
            opening.release()

    async def aclose(self) -> None:
        """End the decoding processes and close the connections."""
        await self.decoders.aclose()
        self._scaler.close()
        await self._fetcher.aclose()

    async def _all(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, stages: _Stages
    ) -> list[tuple[Opened, ...]]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str, media: Media) -> tuple[Opened, ...]:
            async with turns:
                try:
                    return await self._open(media, fit, stages)
                except MediaError as error:
                    raise error.of(f"The {_NAMES[media.kind]} of {name}") from error

        tasks: list[asyncio.Task[tuple[Opened, ...]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(name, media)) for name, media in named]
        except BaseExceptionGroup as failures:
            # The others were cancelled; of several that failed together, the first is told.
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _open(self, media: Media, fit: Fit | None, stages: _Stages) -> tuple[Opened, ...]:
        with stages.fetching if isinstance(media.source, str) and is_url(media.source) else stages.decoding:
            data = await self._read(media.source, self._most_bytes(media.kind))
        found = sniff(data)
        _check_kind(found, media.kind)
        pieces = _Pieces(self._scaler, fit if isinstance(fit, Scaling) else None)
        share = _Share(self.pixels)
        rules = self._rules(media.kind, found, fit)
        film = media.kind is Modality.VIDEO
        seconds = self._settings.media_film_decoder_seconds if film else self._settings.media_decoder_seconds
        with stages.decoding, DECODE_SECONDS.labels(media.kind).time():
            try:
                await self.decoders.decode(data, rules, seconds, share.wait, pieces.take)
            finally:
                share.release()
        return pieces.joined(media.kind)

    def _most_bytes(self, kind: Modality) -> int:
        settings = self._settings
        return settings.media_max_film_bytes if kind in _STREAMS else settings.media_max_bytes

    async def _read(self, source: str | bytes, limit: int) -> bytes:
        if isinstance(source, bytes):
            if len(source) > limit:
                raise MediaError(f"it is larger than {limit:,} bytes")
            if not source:
                raise MediaError("it is empty")
            return source
        if is_url(source):
            outcome = "cancelled"
            try:
                data = await self._fetcher.read(source, max_bytes=limit)
                outcome = "ok"
                return data
            except FetchError as error:
                outcome = "failed" if error.retryable else "refused"
                raise MediaError(f"fetching '{shown(source)}' failed: {error.cause}") from error
            finally:
                FETCHES.labels(outcome).inc()
        if len(source) > _IN_THREAD_BYTES:
            return await asyncio.to_thread(read_inline, source, limit)
        return read_inline(source, limit)

    def _rules(self, kind: Modality, found: Found, fit: Fit | None) -> dict[str, Any]:
        settings = self._settings
        rules: dict[str, Any] = {
            "kind": str(kind),
            "max_pixels": settings.media_max_pixels,
            "max_aspect": _MAX_ASPECT,
            "upright": settings.media_upright,
        }
        if kind in _STREAMS:
            return rules | {
                "container": CONTAINERS[found.name],
                "rate": SOUND_RATE,
                "sound_seconds": SOUND_SECONDS,
                "frames": fit.frames if isinstance(fit, Scaling) else _FRAMES,
                "max_seconds": settings.media_max_seconds,
                "max_frames": settings.media_max_frames,
            }
        return rules | {
            "max_pages": settings.media_max_pages,
            "max_pages_pixels": settings.media_max_pixels if fit is None else 0,
            "fit": astuple(fit) if isinstance(fit, Square) else None,
        }

    def _expected(self, named: Sequence[tuple[str, Media]], fit: Fit | None) -> int:
        """Return at most how many bytes media will take: files that came with the call, all pixels, and the
        larger of the largest others in hand at a time and of what is made of the pixels.
        """
        limits = [(media.source, self._most_bytes(media.kind)) for _, media in named]
        files = sorted((_file_bytes(source, limit) for source, limit in limits), reverse=True)
        pixels = sum(self._expected_of(media.kind, fit) for _, media in named)
        return _sent_bytes(named) + pixels + max(sum(files[:_AT_ONCE]), _copies(fit) * pixels)

    def _expected_of(self, kind: Modality, fit: Fit | None) -> int:
        pixels = self._settings.media_max_pixels
        if isinstance(fit, Square):
            pixels = fit.side**2
        elif fit is not None:
            pixels = fit.film_max_pixels if kind is Modality.VIDEO else fit.max_pixels
        match kind:
            case Modality.AUDIO:
                return _SOUND_BYTES
            case Modality.VIDEO:
                return _SOUND_BYTES + _PIXEL_BYTES * pixels
            case Modality.PDF:
                return _PIXEL_BYTES * pixels * self._settings.media_max_pages
            case _:
                return _PIXEL_BYTES * pixels


class Opening:
    """See ``services.core.content.Opening``."""

    def __init__(self, reservation: Reservation, sent: int) -> None:
        """``sent`` bytes came with the call and stay with it."""
        self._reservation = reservation
        self._sent = sent
        self._opened: deque[tuple[Opened, ...]] = deque()
        self._holders = 1

    def fill(self, opened: Sequence[tuple[Opened, ...]], fit: Fit | None) -> None:
        """Take in what the media became. The files of others than ``sent`` are gone."""
        self._opened.extend(opened)
        # What is made of pictures as they are is not known, so room for the largest of them stays.
        if fit is not None:
            pixels = sum(_bytes(one) for several in opened for one in several)
            self._reservation.resize(self._sent + pixels * (1 + _copies(fit)))

    def take(self) -> tuple[Opened, ...]:
        """See ``services.core.content.Opening``, as for the others."""
        return self._opened.popleft()

    def became(self, size: int) -> None:
        """Count what was made instead of what was taken."""
        self._reservation.resize(self._sent + size)

    def outlive(self) -> Callable[[], None]:
        """Add a holder; what is returned takes it away."""
        self._holders += 1
        return self.release

    def release(self) -> None:
        """Give the bytes back, unless another still holds them."""
        self._holders -= 1
        if not self._holders:
            self._opened.clear()
            self._reservation.release()


class _Share:
    """What one file holds of the pixels that are being decoded."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._reservation: Reservation | None = None

    async def wait(self, size: int) -> None:
        """Wait for room; see ``decoders.Room``. Nothing is held meanwhile."""
        self.release()
        self._reservation = await self._budget.reserve(size)
        # A picture of more than all has all, and is counted as what it is.
        self._reservation.resize(size)

    def release(self) -> None:
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None


class _Stages:
    """Measures for how long a call has files that are fetched, and files that are decoded."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._active = {"fetch": 0, "decode": 0}
        self._began = {"fetch": 0.0, "decode": 0.0}

    @property
    def fetching(self) -> AbstractContextManager[None]:
        return self._stage("fetch")

    @property
    def decoding(self) -> AbstractContextManager[None]:
        return self._stage("decode")

    @contextmanager
    def _stage(self, name: str) -> Generator[None]:
        """Several at a time count once."""
        if not self._active[name]:
            self._began[name] = time.monotonic()
        self._active[name] += 1
        try:
            yield
        finally:
            self._active[name] -= 1
            if not self._active[name]:
                spent = getattr(self._timings, name) + time.monotonic() - self._began[name]
                setattr(self._timings, name, spent)


class _Pieces:
    """What comes of one file, put together as its pieces come."""

    def __init__(self, scaler: Scaler, fit: Scaling | None) -> None:
        """With ``fit`` pictures and frames are scaled as they come."""
        self._scaler = scaler
        self._fit = fit
        self._images: list[Image] = []
        self._sound: Sound | None = None
        self._frames: NDArray[np.uint8] | None = None
        self._count = 0
        self._promised = 0

    async def take(self, head: Head, read: Callable[[], Awaitable[bytearray]]) -> None:
        """Take the next piece; see ``decoders.Take``."""
        if "film" in head:
            # A second one comes where the film is shorter than it seemed.
            self._promised, self._frames, self._count = head["film"], None, 0
            await read()
        elif "sound" in head:
            self._sound = Sound(np.frombuffer(await read(), "<f4"))
        elif "frame" in head:
            width, height = size = tuple(head["frame"])
            if self._fit is not None:
                size = self._fit.frame_size(self._promised, width, height)
            frame = await self._scaled(width, height, size, read)
            if self._frames is None:
                self._frames = np.empty((self._promised, *frame.shape), np.uint8)
            self._frames[self._count] = frame
            self._count += 1
        else:
            width, height = size = tuple(head["image"])
            if self._fit is not None:
                size = self._fit.size(width, height)
            pixels = await self._scaled(width, height, size, read)
            self._images.append(Image(pixels, tuple(head["source"])))

    async def _scaled(
        self, width: int, height: int, size: tuple[int, int], read: Callable[[], Awaitable[bytearray]]
    ) -> NDArray[np.uint8]:
        pixels = np.frombuffer(await read(), np.uint8).reshape(height, width, _PIXEL_BYTES)
        return pixels if size == (width, height) else await self._scaler.scaled(pixels, size)

    def joined(self, kind: Modality) -> tuple[Opened, ...]:
        """Return what a file of ``kind`` has become."""
        if kind is Modality.VIDEO:
            assert self._frames is not None
            return (Film(self._frames[: self._count], self._sound),)
        if kind is Modality.AUDIO:
            assert self._sound is not None
            return (self._sound,)
        return tuple(self._images)


def _bytes(opened: Opened) -> int:
    match opened:
        case Image():
            return opened.pixels.nbytes
        case Sound():
            return opened.samples.nbytes
        case Film():
            return opened.frames.nbytes + (0 if opened.sound is None else opened.sound.samples.nbytes)


def _copies(fit: Fit | None) -> int:
    """How many times as many bytes as those of pixels a processor makes of them; the pixels are no part."""
    return fit.copies if isinstance(fit, Scaling) else 0


def _sent_bytes(named: Sequence[tuple[str, Media]]) -> int:
    """Bytes of the files that stand in the call itself, as long as it does. Texts are counted as bodies."""
    return sum(len(media.source) for _, media in named if isinstance(media.source, bytes))


def _file_bytes(source: str | bytes, limit: int) -> int:
    """Return at most how many bytes will come of a source in which they do not stand already."""
    if isinstance(source, bytes):
        return 0
    return limit if is_url(source) else min(limit, expected_bytes(source))


def _check_kind(found: Found, kind: Modality) -> None:
    """Raise MediaError unless a file of what was found can be read in a field of ``kind``.

    Of a container that may hold a film or only its sound, the decoder tells which.
    """
    either = kind in _STREAMS and found.name in EITHER
    if found.kind != kind and not either:
        was = f"it is {found.name}" if found.kind != "unknown" else "its format is not known"
        raise MediaError(
            f"{was}, not {'a' if kind in (Modality.PDF, Modality.VIDEO) else 'an'} {_NAMES[kind]}"
        )
    if kind is Modality.IMAGE and found.name not in _SERVED:
        raise MediaError(f"{found.name} is not read; send {', '.join(sorted(_SERVED))}")
    if kind in _STREAMS and found.name not in CONTAINERS:
        raise MediaError(f"{found.name} is not read; send {', '.join(sorted(CONTAINERS))}")

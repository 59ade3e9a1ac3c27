"""From the bytes of a sound or film to samples and frames. Runs in the decoding processes only.

Imports nothing of ours but ``pictures``. Everything is read by the one demuxer that the server names, so
that no file can make itself a playlist; nothing behind the seconds that are asked for is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import av
import av.logging
import numpy as np
import soundfile
import soxr
from av.error import FFmpegError
from av.stream import Disposition
from numpy.typing import NDArray

from services.core.media.pictures import Piece, Refused, needs

_BROKEN = (FFmpegError, soundfile.SoundFileError, OSError, ValueError, EOFError, OverflowError)
_SOUND_CONTAINERS = frozenset({"wav", "flac", "ogg", "mp3", "aiff", "au"})
"""Read by libsndfile, as the published processors do; the rest by FFmpeg."""

_BLOCK = 1 << 16
_MARGIN_SECONDS = 1.0
"""What the resampler wants to know of behind the last sample that is kept."""

_MOST_CHANNELS = 64
_MOST_RATE = 768_000
_MISSING_SHARE, _MISSING_SECONDS = 0.9, 0.25
"""A file that holds less than this share of what its header says was cut off; headers are a little off."""

_UNKNOWN_SIZE = 0x7FFF_0000
"""From here on, and at 0, the size in the head of a file is that of a stream."""

Samples = NDArray[np.float32]

av.logging.set_level(av.logging.PANIC)


class Rules(NamedTuple):
    """What to do with a file, and how much of it is done.

    ``container`` is FFmpeg's name of its format. Of sound the first ``sound_seconds`` are given, mono at
    ``rate`` a second. Of a film so many ``frames``, evenly spread, are given, all if there are no more;
    ``upright`` turns them as the film says. What is longer than ``max_seconds`` or ``max_frames`` is
    refused.
    """

    kind: str
    container: str
    rate: int
    sound_seconds: float
    frames: int
    max_seconds: float
    max_frames: int
    max_pixels: int
    max_aspect: int
    upright: bool

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Rules:
        """Read the rules as they come from the server."""
        return cls(**{name: fields[name] for name in cls._fields})


def decode(data: bytes, rules: Rules) -> Iterator[Piece]:
    """Give the samples of a sound, or those of a film if it has any, and then its frames. Raises Refused.

    A frame that comes behind a second head of a film belongs to that: the first promised frames that are
    not there.
    """
    try:
        if rules.kind == "audio":
            yield _sound_piece(_sound(data, rules))
        else:
            yield from _film(data, rules)
    except _BROKEN as error:
        raise Refused("it is broken or truncated") from error


def _sound(data: bytes, rules: Rules) -> Samples:
    if rules.container in _SOUND_CONTAINERS and not _is_vorbis_film(data):
        _check_head(data)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_seconds(file.frames / file.samplerate if file.seekable() else None, rules)
            promised = file.frames
            mono = _mono_blocks(file, rules)
            wanted = min(promised, _wanted(file.samplerate, rules))
            if len(mono) < wanted * _MISSING_SHARE:
                raise Refused("it is truncated")
            rate = file.samplerate
    else:
        mono, rate = _track(data, rules)
    if not len(mono):
        raise Refused("it has no samples")
    return _prepared(
        mono if rate == rules.rate else soxr.resample(mono, rate, rules.rate, quality="HQ"), rules
    )


def _is_vorbis_film(data: bytes) -> bool:
    """Whether an Ogg has a film in its first pages."""
    return data.startswith(b"OggS") and (b"\x80theora" in data[:4096])


def _check_head(data: bytes) -> None:
    """Refuse a file that says it is longer than it is; of WAV, AIFF and AU libsndfile gives what there is."""
    if data.startswith(b"RIFF"):
        size, start = int.from_bytes(data[4:8], "little"), 8
    elif data.startswith(b"FORM"):
        size, start = int.from_bytes(data[4:8], "big"), 8
    elif data.startswith(b".snd"):
        size, start = int.from_bytes(data[8:12], "big"), int.from_bytes(data[4:8], "big")
    else:
        return
    if 0 < size < _UNKNOWN_SIZE and start + size > len(data) + 1:
        raise Refused("it is truncated")


def _wanted(rate: int, rules: Rules) -> int:
    return int((rules.sound_seconds + _MARGIN_SECONDS) * rate)


def _mono_blocks(file: soundfile.SoundFile, rules: Rules) -> Samples:
    _check_form(file.samplerate, file.channels)
    left = _wanted(file.samplerate, rules)
    blocks: list[Samples] = []
    while left > 0:
        block = cast(Samples, file.read(min(_BLOCK, left), dtype="float32", always_2d=True))
        if not len(block):
            break
        blocks.append(block.mean(axis=1))
        left -= len(block)
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _check_form(rate: int, channels: int) -> None:
    if not (0 < rate <= _MOST_RATE and 0 < channels <= _MOST_CHANNELS):
        raise Refused(f"sound of {channels} channels at {rate} a second is not read")


def _track(data: bytes, rules: Rules) -> tuple[Samples, int]:
    """Return the sound of a container that has no film, mono, at its own rate."""
    with _opened(data, rules) as container:
        if _films(container):
            raise Refused("it is a film; send it as a video")
        if not container.streams.audio:
            raise Refused("it has no sound")
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        _check_form(rate, stream.codec_context.channels)
        _check_seconds(_seconds(container), rules)
        mono = _heard(container, stream, _wanted(rate, rules), format="fltp", rate=rate)
        promised = _seconds(container)
        if promised is not None:
            promised = min(promised - _MISSING_SECONDS, rules.sound_seconds)
            if len(mono) < _MISSING_SHARE * promised * rate:
                raise Refused("it is truncated")
        return mono, rate


def _heard(container: Any, stream: Any, most: int, **form: Any) -> Samples:
    """Decode up to ``most`` samples, resampled by FFmpeg to ``form``; channels that are left are averaged."""
    resampler = av.AudioResampler(**form)
    parts: list[Samples] = []
    count = 0

    def add(frames: Iterable[Any]) -> None:
        nonlocal count
        for frame in frames:
            part = np.atleast_2d(frame.to_ndarray()).mean(axis=0, dtype=np.float32)
            parts.append(part)
            count += len(part)

    for frame in container.decode(stream):
        add(resampler.resample(frame))
        if count >= most:
            break
    else:
        add(resampler.resample(None))
    return np.concatenate(parts)[:most] if parts else np.empty(0, np.float32)


def _prepared(samples: Samples, rules: Rules) -> Samples:
    """What is no number is silence, and what is too loud is scaled to 1."""
    samples = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > 1.0:
        samples = samples / peak
    return samples[: int(rules.sound_seconds * rules.rate)].astype(np.float32)


def _sound_piece(samples: Samples) -> Piece:
    return Piece({"sound": len(samples)}, samples.astype("<f4").tobytes())


def _film(data: bytes, rules: Rules) -> Iterator[Piece]:
    with _opened(data, rules) as container:
        if not _films(container):
            raise Refused("it has no pictures, only sound; send it as audio")
        _check_seconds(_seconds(container), rules)
        stream = _films(container)[0]
        _check_size(stream.codec_context.width, stream.codec_context.height, rules)
        yield needs(stream.codec_context.width * stream.codec_context.height)
        count = _counted(container, stream, rules)
        audio = bool(container.streams.audio)
    if audio:
        yield from _film_sound(data, rules)
    found = yield from _frames(data, count, rules)
    if found != count:
        if found < count * _MISSING_SHARE:
            raise Refused("it is truncated")
        if _places(found, rules) != _places(count, rules):
            yield from _frames(data, found, rules)


def _film_sound(data: bytes, rules: Rules) -> Iterator[Piece]:
    with _opened(data, rules) as container:
        most = int(rules.sound_seconds * rules.rate)
        samples = _heard(
            container, container.streams.audio[0], most, format="flt", layout="mono", rate=rules.rate
        )
    if len(samples):
        yield _sound_piece(_prepared(samples, rules))


def _counted(container: Any, stream: Any, rules: Rules) -> int:
    """Count the frames without decoding any: headers are often wrong."""
    count, last = 0, 0.0
    for packet in container.demux(stream, *container.streams.audio):
        if packet.pts is not None:
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        count += packet.stream is stream and packet.size > 0 and not packet.is_discard
        if count > rules.max_frames:
            raise Refused(f"it has more than {rules.max_frames:,} frames")
    _check_seconds(last, rules)
    promised = (_seconds(container) or 0.0) - _MISSING_SECONDS
    if not count:
        raise Refused("it has no frames")
    if count < _MISSING_SHARE * stream.frames or last < _MISSING_SHARE * promised:
        raise Refused("it is truncated")
    return count


def _places(count: int, rules: Rules) -> list[int]:
    if count <= rules.frames:
        return list(range(count))
    return np.linspace(0, count - 1, rules.frames).astype(int).tolist()


def _frames(data: bytes, count: int, rules: Rules) -> Iterator[Any]:
    """Give the frames that are kept of ``count``; returns how many there are."""
    places = _places(count, rules)
    yield Piece({"film": len(places)}, b"")
    wanted, found = set(places), 0
    size: tuple[int, int] | None = None
    with _opened(data, rules) as container:
        for frame in container.decode(_films(container)[0]):
            if found in wanted:
                pixels, size = _pixels(frame, size, rules)
                height, width, _ = pixels.shape
                yield Piece({"frame": [width, height]}, pixels.tobytes())
            found += 1
            if found > rules.max_frames:
                raise Refused(f"it has more than {rules.max_frames:,} frames")
    if not found:
        raise Refused("it has no frames that can be decoded")
    return found


def _pixels(
    frame: Any, size: tuple[int, int] | None, rules: Rules
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Return a frame in RGB, in the ``size`` of the first one."""
    _check_size(frame.width, frame.height, rules)
    if size is not None and size != (frame.width, frame.height):
        frame = frame.reformat(width=size[0], height=size[1])
    size = size or (frame.width, frame.height)
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    if rules.upright and frame.rotation:
        # Its rotation is how far it is to be turned back, clockwise being below 0.
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    return pixels, size


@contextmanager
def _opened(data: bytes, rules: Rules) -> Generator[Any]:
    options = {"protocol_whitelist": "none"}
    with av.open(io.BytesIO(data), format=rules.container, options=options) as container:
        for stream in (*container.streams.video, *container.streams.audio):
            stream.codec_context.thread_count = 1
        yield container


def _films(container: Any) -> list[Any]:
    """The streams of pictures that move; a cover is none."""
    cover = Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _seconds(container: Any) -> float | None:
    return None if container.duration is None else container.duration / av.time_base


def _check_seconds(seconds: float | None, rules: Rules) -> None:
    if seconds is not None and seconds > rules.max_seconds:
        raise Refused(f"it is {seconds:,.0f} seconds long, {rules.max_seconds:,.0f} are allowed")


def _check_size(width: int, height: int, rules: Rules) -> None:
    if min(width, height) < 1:
        raise Refused("its frames have no size that is known")
    if width * height > rules.max_pixels:
        raise Refused(f"its frames have {width * height:,} pixels, {rules.max_pixels:,} are allowed")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused(f"the sides of its frames differ by more than {rules.max_aspect} times")

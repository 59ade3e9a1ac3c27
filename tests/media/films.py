"""Sounds and films of all kinds, made here: every frame and sample is known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

TONE_HZ = 440.0


def tone(
    seconds: float, rate: int = 16_000, channels: int = 1, hertz: float = TONE_HZ
) -> NDArray[np.float32]:
    """A tone (samples, channels), each channel half as loud as the one before."""
    at = np.arange(int(seconds * rate)) / rate
    loudness = 0.5 ** np.arange(1, channels + 1)
    return (np.sin(2 * np.pi * hertz * at)[:, None] * loudness).astype(np.float32)


@cache
def sound(
    seconds: float = 0.5,
    rate: int = 16_000,
    channels: int = 1,
    format: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    """A tone in a format of libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, tone(seconds, rate, channels), rate, subtype, format=format)
    return file.getvalue()


def frames(count: int, width: int, height: int) -> NDArray[np.uint8]:
    """Frames (count, height, width, 3) of smooth colours that tell their number: its grey stands in the
    left half.
    """
    pixels = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        pixels[number] = 40 + (number * 7) % 180
        pixels[number, :, width // 2 :, 0] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return pixels


@cache
def film(
    container: str = "mp4",
    codec: str = "libx264",
    count: int = 10,
    size: tuple[int, int] = (64, 48),
    rate: int = 25,
    sound: str | None = None,
    at: Sequence[int] | None = None,
    rotation: int = 0,
    options: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """A film of ``frames``; ``at`` are the times of the frames where they are not even, in 1/1000 s.

    ``sound`` is the codec of a stereo tone at 48 kHz, as long as the film.
    """
    file: Any = io.BytesIO()
    seconds = count / rate
    with av.open(file, "w", format=container, options=dict(options)) as target:
        stream: Any = target.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = {"libx264": "yuv444p", "ffv1": "bgr0"}.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if at is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = None
        if sound is not None:
            audio = target.add_stream(sound, rate=48_000, layout="stereo", bit_rate=128_000)
        for number, pixels in enumerate(frames(count, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if at is not None:
                frame.pts, frame.time_base = at[number], Fraction(1, 1000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
        if audio is not None:
            _add_tone(target, audio, seconds)
    return file.getvalue()


@cache
def encoded_sound(container: str, codec: str, seconds: float = 1.0) -> bytes:
    """A stereo tone at 48 kHz in a container of FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as target:
        stream = target.add_stream(codec, rate=48_000, layout="stereo", bit_rate=128_000)
        _add_tone(target, stream, seconds)
    return file.getvalue()


def _add_tone(target: Any, stream: Any, seconds: float) -> None:
    samples = tone(seconds, 48_000, 2)
    step = stream.codec_context.frame_size or 1024
    for start in range(0, len(samples), step):
        part = np.ascontiguousarray(samples[start : start + step].T)
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, start
        target.mux(stream.encode(frame))
    target.mux(stream.encode(None))

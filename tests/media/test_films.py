"""Sounds and films opened: what comes out beside the libraries that read them, what is refused and how."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import av
import numpy as np
import pytest
import pytest_asyncio
import soundfile
import soxr
import torch
from PIL import Image as Pillow
from torch.nn.functional import interpolate
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as film_resize

from services.core.call import Call
from services.core.catalog.types import Modality
from services.core.content import Film, Media, Scaling, Sound
from services.core.media import films
from services.core.media.errors import MediaError
from services.core.media.room import MediaRoom
from services.core.media.scaling import scale
from services.core.settings import Settings
from tests.media.films import encoded_sound, film, sound, tone
from tests.media.pictures import noise, photograph, saved

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIT = Scaling(32, 262_144, 1_310_720, frames=32, film_min_pixels=262_144, film_max_pixels=12_845_056)
WITH_SOUND = {
    ("mp4", "libx264"): "aac",
    ("mov", "mpeg4"): "aac",
    ("matroska", "libx264"): "flac",
    ("webm", "libvpx-vp9"): "libopus",
    ("avi", "mpeg4"): "libmp3lame",
    ("flv", "flv"): "aac",
    ("asf", "wmv2"): "wmav2",
    ("mpegts", "libx264"): "aac",
    ("mpeg", "mpeg2video"): "mp2",
}
SAYS_NO_LENGTH = {"asf", "mpegts", "mpeg"}


def new_room(**changes: Any) -> MediaRoom:
    return MediaRoom(Settings(**{"media_decoders": 1, **changes}))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def room() -> AsyncIterator[MediaRoom]:
    room = new_room()
    yield room
    await room.aclose()


async def opened(room: MediaRoom, kind: Modality, data: bytes, fit: Scaling | None = None) -> Any:
    async with room.open([("input 0", Media(kind, data))], fit, Call("test")) as opening:
        (one,) = opening.take()
        return one


async def heard(room: MediaRoom, data: bytes) -> np.ndarray:
    one = await opened(room, Modality.AUDIO, data)
    assert isinstance(one, Sound)
    assert one.samples.dtype == np.float32
    return one.samples


async def seen(room: MediaRoom, data: bytes, fit: Scaling | None = None) -> Film:
    one = await opened(room, Modality.VIDEO, data, fit)
    assert isinstance(one, Film)
    return one


async def refused(room: MediaRoom, kind: Modality, data: bytes) -> str:
    with pytest.raises(MediaError) as told:
        await opened(room, kind, data)
    assert told.value.detail.startswith(f"The {kind} of input 0 cannot be used: ")
    assert room.budget.held == 0
    return told.value.detail


def all_frames(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def loudest(samples: np.ndarray) -> float:
    """The frequency that is loudest, in hertz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples))


@pytest.mark.parametrize(
    ("format", "subtype", "rate", "channels"),
    [
        ("WAV", "PCM_16", 8_000, 1),
        ("WAV", "PCM_24", 96_000, 2),
        ("WAV", "FLOAT", 44_100, 6),
        ("FLAC", "PCM_24", 48_000, 2),
        ("OGG", "VORBIS", 22_050, 1),
        ("OGG", "OPUS", 48_000, 2),
        ("MP3", None, 32_000, 2),
        ("AIFF", "PCM_16", 16_000, 1),
        ("AU", "PCM_16", 11_025, 1),
    ],
)
async def test_sound_files_are_averaged_and_resampled(
    room: MediaRoom, format: str, subtype: str | None, rate: int, channels: int
) -> None:
    data = sound(0.7, rate, channels, format, subtype)
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    wanted = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    found = await heard(room, data)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert abs(loudest(found) - 440) < 5


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "aac"), ("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("asf", "wmav2")],
)
async def test_containers_with_nothing_but_sound(room: MediaRoom, container: str, codec: str) -> None:
    data = encoded_sound(container, codec)
    samples = await heard(room, data)
    assert 15_500 < len(samples) < 16_500
    assert abs(loudest(samples) - 440) < 5
    assert "has no pictures, only sound" in await refused(room, Modality.VIDEO, data) or container == "adts"


async def test_of_a_long_sound_the_beginning_is_heard(room: MediaRoom) -> None:
    whole = await heard(room, sound(33.0, 8_000))
    assert len(whole) == 480_000
    wanted = soxr.resample(tone(33.0, 8_000)[:, 0], 8_000, 16_000, quality="HQ")[:480_000]
    np.testing.assert_allclose(whole, wanted, atol=2e-4)  # the samples are rounded to 16 bits


async def test_what_is_no_number_is_silent_and_what_is_loud_is_scaled(room: MediaRoom) -> None:
    samples = np.array([0.5, np.nan, np.inf, -4.0, 2.0] * 100, np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, "FLOAT", format="WAV")
    wanted = np.array([0.125, 0.0, 0.0, -1.0, 0.5] * 100, np.float32)
    np.testing.assert_array_equal(await heard(room, file.getvalue()), wanted)


@pytest.mark.parametrize(("container", "codec"), WITH_SOUND)
async def test_films_are_read_as_ffmpeg_reads_them(room: MediaRoom, container: str, codec: str) -> None:
    data = film(container, codec, 40, sound=WITH_SOUND[container, codec])
    found = await seen(room, data)
    frames = all_frames(data)
    places = np.linspace(0, len(frames) - 1, 32).astype(int)
    assert np.array_equal(found.frames, np.stack([frames[i] for i in places]))
    assert found.sound is not None
    assert abs(len(found.sound.samples) - 25_600) < 1_000
    assert abs(loudest(found.sound.samples) - 440) < 5
    assert "it is a film" in await refused(room, Modality.AUDIO, data)
    half = data[: len(data) // 2]
    if container not in SAYS_NO_LENGTH:
        detail = await refused(room, Modality.VIDEO, half)
        assert "truncated" in detail


@pytest.mark.parametrize(
    ("count", "size", "rate", "at"),
    [
        (1, (64, 48), 1, None),
        (3, (65, 47), 1, None),
        (7, (64, 48), 60, None),
        (32, (64, 48), 25, None),
        (6, (64, 48), 30, (0, 10, 500, 510, 2_000, 9_000)),
    ],
)
async def test_short_films_are_kept_whole(
    room: MediaRoom, count: int, size: tuple[int, int], rate: int, at: tuple[int, ...] | None
) -> None:
    data = film(count=count, size=size, rate=rate, at=at)
    found = await seen(room, data)
    assert found.sound is None
    assert found.frames.shape == (count, size[1], size[0], 3)
    assert np.array_equal(found.frames, np.stack(all_frames(data)))
    greys = found.frames[:, 4:-4, 4 : size[0] // 2 - 4].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(greys, [40 + (i * 7) % 180 for i in range(count)], atol=6)


async def test_a_film_shorter_than_its_packets_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(count=40)
    rules = films.Rules("video", "mov", 16_000, 30, 32, 600, 20_000, 1 << 20, 200, upright=False)
    monkeypatch.setattr(films, "_counted", lambda *_: 43)
    pieces = list(films.decode(data, rules))
    first, second = (number for number, piece in enumerate(pieces) if "film" in piece.head)
    assert second - first < 33  # some of the frames that it then looked for were not there
    found = [np.frombuffer(piece.data, np.uint8).reshape(48, 64, 3) for piece in pieces[second + 1 :]]
    frames, places = all_frames(data), np.linspace(0, 39, 32).astype(int)
    assert np.array_equal(found, [frames[i] for i in places])


async def test_a_turned_film_is_turned_where_the_operator_says_so(room: MediaRoom) -> None:
    data = film(count=2, rotation=90)
    plain = await seen(room, data)
    assert plain.frames.shape == (2, 48, 64, 3)
    with av.open(io.BytesIO(data)) as container:
        turn = next(container.decode(video=0)).rotation
    assert turn in (90, -90)
    upright = new_room(media_upright=True)
    try:
        turned = (await seen(upright, data)).frames
    finally:
        await upright.aclose()
    # What the film calls a turn by 90 degrees is against the clock.
    assert np.array_equal(turned, np.rot90(plain.frames, turn // 90, axes=(1, 2)))


async def test_a_film_without_its_index_is_read(room: MediaRoom) -> None:
    data = film("avi", "mpeg4", 12)
    start = data.index(b"idx1")
    broken = data[:start] + b"JUNK" + data[start + 4 :]
    assert np.array_equal((await seen(room, broken)).frames, (await seen(room, data)).frames)


async def test_frames_are_scaled_as_they_come(room: MediaRoom) -> None:
    data = film(count=3, size=(300, 200))
    found = await seen(room, data, FIT)
    size = FIT.frame_size(3, 300, 200)
    assert found.frames.shape == (3, *size[::-1], 3)
    for frame, source in zip(found.frames, all_frames(data), strict=True):
        assert np.array_equal(frame, scale(source, size))
        close = np.asarray(Pillow.fromarray(source).resize(size, Pillow.Resampling.BICUBIC), np.int16)
        assert np.abs(frame - close).max() <= 1


@pytest.mark.parametrize(
    "size", [(512, 512), (427, 640), (77, 100), (1755, 1240), (3000, 4000), (3, 500), (1, 2)]
)
async def test_sizes_are_those_of_the_published_processors(size: tuple[int, int]) -> None:
    height, width = size
    assert FIT.size(width, height)[::-1] == smart_resize(*size, 32, FIT.min_pixels, FIT.max_pixels)
    for frames in (2, 3, 31, 32):
        wanted = film_resize(frames, *size, 2, 32, FIT.film_min_pixels, FIT.film_max_pixels)
        assert FIT.frame_size(frames, width, height)[::-1] == wanted


async def test_pictures_are_scaled_to_patches(room: MediaRoom) -> None:
    """To the pixel by torch's filter, as the fast processors do; Pillow's is another one, close by."""
    pictures = [noise(1300, 900), noise(100, 77), noise(56, 84), noise(1500, 1100)]
    for data in (photograph(), *(saved(each) for each in pictures)):
        source = Pillow.open(io.BytesIO(data)).convert("RGB")
        found = await opened(room, Modality.IMAGE, data, FIT)
        assert found.source_size == source.size
        size = FIT.size(*source.size)
        assert found.pixels.shape == (*size[::-1], 3)
        planes = torch.from_numpy(np.array(source)).permute(2, 0, 1).contiguous()[None]
        made = interpolate(planes, size=size[::-1], mode="bicubic", antialias=True)
        assert np.array_equal(found.pixels, made[0].permute(1, 2, 0))
        close = np.asarray(source.resize(size, Pillow.Resampling.BICUBIC), np.int16)
        assert np.abs(found.pixels - close).mean() < 1


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        ("audio", lambda: saved(noise(4, 4)), "it is PNG, not an audio"),
        ("video", lambda: sound(), "it is WAV, not a video"),
        ("video", lambda: b"#EXTM3U\nfile:///etc/passwd\n", "it is plain text, not a video"),
        ("video", lambda: b"\x00\x00\x00\x18ftypmp42" + bytes(4000), "it is broken or truncated"),
        ("video", lambda: b"\x1a\x45\xdf\xa3" + bytes(4000), "it is broken or truncated"),
        ("video", lambda: b"RIFF\x00\x10\x00\x00AVI " + bytes(4000), "it"),
        ("audio", lambda: b"ID3" + bytes(4000), "it is broken or truncated"),
        ("audio", lambda: b"fLaC" + bytes(4000), "it is broken or truncated"),
        ("audio", lambda: b"OggS" + bytes(4000), "it is broken or truncated"),
        ("audio", lambda: b"RIFF\x24\x00\x00\x00WAVE" + bytes(4000), "it is broken or truncated"),
        ("audio", lambda: sound(0.0), "it has no samples"),
        ("audio", lambda: sound(1.0, 16_000, 1, "FLAC")[:3000], "truncated"),
        ("audio", lambda: sound(1.0)[:3000], "it is truncated"),
        ("audio", lambda: sound(11.0), "it is 11 seconds long, 10 are allowed"),
        ("video", lambda: film(count=12, rate=1), "seconds long, 10 are allowed"),
        ("video", lambda: film("matroska", "mpeg4", 90, rate=60), "it has more than 80 frames"),
        (
            "video",
            lambda: film(count=2, size=(402, 400)),
            "its frames have 160,800 pixels, 160,000 are allowed",
        ),
        ("video", lambda: film(count=2, size=(1608, 8)), "differ by more than 200 times"),
    ],
)
async def test_bad_files_are_refused_and_the_process_lives(
    bounded: MediaRoom, kind: str, make: Any, says: str
) -> None:
    assert says in await refused(bounded, Modality(kind), make())
    assert len(await heard(bounded, sound(0.1))) == 1_600
    assert len(bounded.decoders.pids) == 1


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bounded() -> AsyncIterator[MediaRoom]:
    room = new_room(media_max_seconds=10.0, media_max_frames=80, media_max_pixels=160_000)
    yield room
    await room.aclose()


async def test_bytes_changed_at_random_cost_their_file_alone(room: MediaRoom) -> None:
    random = np.random.default_rng(7)
    files = [(Modality.VIDEO, film(c, v, 6, sound=WITH_SOUND[c, v])) for c, v in list(WITH_SOUND)[:6]] + [
        (Modality.AUDIO, sound(0.3, 16_000, 2, f)) for f in ("WAV", "FLAC", "OGG", "MP3")
    ]
    for kind, data in files:
        for _ in range(4):
            changed = np.frombuffer(data, np.uint8).copy()
            places = random.integers(12, len(data), 30)
            changed[places] = random.integers(0, 256, len(places))
            with suppress(MediaError):
                await opened(room, kind, changed.tobytes())
    assert len(await heard(room, sound(0.1))) == 1_600
    assert room.budget.held == 0


async def test_a_film_that_takes_too_long_is_given_up(room: MediaRoom) -> None:
    slow = new_room(media_film_decoder_seconds=0.02)
    try:
        assert "it takes more than 0.02 seconds to decode" in await refused(slow, Modality.VIDEO, film())
    finally:
        await slow.aclose()


async def test_a_cancelled_call_ends_its_decoding(room: MediaRoom) -> None:
    task = asyncio.create_task(opened(room, Modality.VIDEO, film("mp4", "mpeg4", 60, (320, 240))))
    while not room.decoders.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert room.decoders.pids == []
    assert room.budget.held == 0


async def test_sixty_four_films_keep_to_the_budget() -> None:
    data = film(count=4, size=(160, 120), sound="aac")
    most = 0
    room = new_room(media_bytes_in_flight=100 << 20, media_decoders=2)

    async def one() -> tuple[int, ...]:
        nonlocal most
        async with room.open([("input 0", Media(Modality.VIDEO, data))], FIT, Call("test")) as opening:
            (found,) = opening.take()
            most = max(most, room.budget.held + room.pixels.held)
            assert isinstance(found, Film)
            return found.frames.shape

    try:
        shapes = await asyncio.gather(*(one() for _ in range(64)))
    finally:
        await room.aclose()
    assert set(shapes) == {(4, *FIT.frame_size(4, 160, 120)[::-1], 3)}
    assert 0 < most <= 100 << 20
    assert room.budget.held == 0

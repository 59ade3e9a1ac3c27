"""Pictures and PDFs opened: what comes out, what is refused and how, what one call does to another."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image as Pillow
from prometheus_client import REGISTRY
from torch.nn.functional import interpolate
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from services.core.call import Call
from services.core.catalog.types import Modality
from services.core.content import Fit, Image, Media, Scaling, Square
from services.core.errors import ErrorCode, ServiceError
from services.core.media.budget import ByteBudget
from services.core.media.errors import MediaError
from services.core.media.room import MediaRoom
from services.core.settings import Settings
from tests.media.films import film
from tests.media.pictures import (
    A4,
    BAD,
    Bad,
    animated,
    deep_grey,
    noise,
    oriented,
    pdf,
    photograph,
    png_comment,
    saved,
    vast_png,
)
from tests.media.web import Request, answer, head, web

SQUARE = Square(16)
Make = Callable[..., MediaRoom]


pytestmark = pytest.mark.asyncio(loop_scope="module")


def new_room(**changes: Any) -> MediaRoom:
    fields = {"fetch_allow_networks": ("127.0.0.1/32",), "media_decoders": 1, **changes}
    return MediaRoom(Settings(**fields))


@pytest_asyncio.fixture(loop_scope="module")
async def make() -> AsyncIterator[Make]:
    made: list[MediaRoom] = []

    def room(**changes: Any) -> MediaRoom:
        made.append(new_room(**changes))
        return made[-1]

    yield room
    for one in made:
        await one.aclose()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def room() -> AsyncIterator[MediaRoom]:
    """One for most tests: what one of them does must not change the next."""
    room = new_room()
    yield room
    await room.aclose()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def upright() -> AsyncIterator[MediaRoom]:
    room = new_room(media_upright=True)
    yield room
    await room.aclose()


def image(source: str | bytes) -> Media:
    return Media(Modality.IMAGE, source)


async def opened(room: MediaRoom, *media: Media, fit: Fit | None = None) -> list[tuple[Image, ...]]:
    named = [(f"input[{i}]", one) for i, one in enumerate(media)]
    async with room.open(named, fit, Call("test")) as opening:
        return [opening.take() for _ in media]


async def pixels(room: MediaRoom, data: bytes) -> np.ndarray:
    ((one,),) = await opened(room, image(data))
    return one.pixels


async def refused(room: MediaRoom, *media: Media, fit: Fit | None = SQUARE) -> str:
    with pytest.raises(ServiceError) as told:
        await opened(room, *media, fit=fit)
    assert told.value.code == ErrorCode.INPUT_INVALID
    return told.value.detail


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_bad_files_are_refused_by_name_and_the_room_goes_on(room: MediaRoom, bad: Bad) -> None:
    good = image(saved(noise(40, 30)))
    detail = await refused(room, good, Media(Modality(bad.field), bad.make()))
    name = "image" if bad.field == "image" else "PDF"
    assert detail.startswith(f"The {name} of input[1] cannot be used: ")
    assert bad.says in detail
    assert room.budget.held == 0
    ((one,),) = await opened(room, good, fit=SQUARE)
    assert one.pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "AVIF", "JPEG"])
async def test_formats_are_read_as_pillow_reads_them(room: MediaRoom, format: str) -> None:
    data = saved(noise(37, 21), format)
    assert np.array_equal(await pixels(room, data), np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
async def test_modes_become_rgb_without_blending(room: MediaRoom, mode: str) -> None:
    picture = noise(9, 5, mode=mode)
    data = saved(picture, "JPEG" if mode == "CMYK" else "PNG")
    assert np.array_equal(await pixels(room, data), np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB")))


async def test_what_is_hidden_by_alpha_shows(room: MediaRoom) -> None:
    data = saved(Pillow.new("RGBA", (2, 1), (200, 0, 0, 0)))
    assert (await pixels(room, data)).tolist() == [[[200, 0, 0], [200, 0, 0]]]


async def test_sixteen_bits_are_cut_off_as_published_processors_do(room: MediaRoom) -> None:
    assert (await pixels(room, deep_grey()))[0, :, 0].tolist() == [0, 255, 255, 255]


async def test_the_smallest_picture_is_taken(room: MediaRoom) -> None:
    ((one,),) = await opened(room, image(saved(noise(1, 1))), fit=SQUARE)
    assert one.source_size == (1, 1)
    assert len(np.unique(one.pixels.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
async def test_of_a_moving_picture_the_first_frame_is_read(room: MediaRoom, format: str) -> None:
    data = animated(format)
    with Pillow.open(io.BytesIO(data)) as first:
        assert first.n_frames == 3
        assert np.array_equal(await pixels(room, data), np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_orientation_is_followed_only_when_told_to(
    room: MediaRoom, upright: MediaRoom, orientation: int
) -> None:
    data = oriented(orientation)
    stored = np.asarray(Pillow.open(io.BytesIO(data)))
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(await pixels(room, data), stored)
    assert np.array_equal(await pixels(upright, data), turned[orientation])


async def test_text_beside_the_pixels_does_not_count(room: MediaRoom) -> None:
    assert (await pixels(room, png_comment("x" * 100_000))).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "write",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: base64.b64encode(data).decode().rstrip("="),
        lambda data: base64.encodebytes(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
        lambda data: "DATA:text/html;BASE64," + base64.b64encode(data).decode(),
        lambda data: "data:;charset=x;base64," + base64.b64encode(data).decode().replace("=", "%3D"),
        lambda data: "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        lambda data: data,
    ],
)
async def test_all_ways_to_write_a_file_down_give_its_pixels(
    room: MediaRoom, write: Callable[[bytes], str | bytes]
) -> None:
    data = saved(noise(5, 4))
    ((one,),) = await opened(room, image(write(data)))
    assert np.array_equal(one.pixels, np.asarray(noise(5, 4)))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("not base64!", "neither a URL nor base64"),
        ("", "it is empty"),
        ("AAAA=AAA", "neither a URL nor base64"),
        ("data:image/png;base64,!!!", "is not base64"),
        ("data:image/png", "has no comma"),
        ("ftp://example.com/a.png", "only http:// and https:// URLs are fetched"),
        ("file:///etc/passwd", "only http:// and https:// URLs are fetched"),
        ("A" * 400, "larger than 256 bytes"),
        ("A" * 10_000, "larger than 256 bytes"),
        (bytes(300), "larger than 256 bytes"),
    ],
)
async def test_what_is_no_file_is_refused(make: Make, source: str | bytes, says: str) -> None:
    assert says in await refused(make(media_max_bytes=256), image(source))


async def test_files_are_fetched(room: MediaRoom) -> None:
    async with web(answer(photograph())) as site:
        (one,), (two,) = await opened(room, image(site.url("/a.jpg")), image(photograph()), fit=SQUARE)
    assert np.array_equal(one.pixels, two.pixels)
    assert one.source_size == (640, 427)


async def test_a_fetch_that_fails_says_why_and_where(make: Make) -> None:
    async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 100))
        await asyncio.Event().wait()

    async def endless(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, None))
        while True:
            writer.write(bytes(10_000))
            await writer.drain()

    small = make(media_max_bytes=100_000, media_fetch_seconds=0.5)
    patient = make(media_max_bytes=100_000)
    cases = [
        (patient, answer(b"", 404), "it answered with status 404"),
        (small, hang, "it took too long"),
        (patient, endless, "larger than 100,000 bytes"),
        (patient, answer(b"<html>", 200), "it is an HTML page, not an image"),
        (patient, answer(b"", 302, Location="http://127.0.0.2/"), "an address that is not public"),
    ]
    for room, handler, says in cases:
        async with web(handler) as site:
            detail = await refused(room, image(saved(noise(4, 4))), image(site.url("/a.png?key=secret")))
            assert says in detail
            assert "input[1]" in detail
            assert "secret" not in detail
    private = await refused(patient, image("http://10.0.0.1/a.png"))
    assert "an address that is not public" in private


def endless(started: asyncio.Event) -> Any:
    """What answers a picture of which more and more comes; ``started`` tells that it has been asked for."""

    async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1 << 20))
        started.set()
        while True:
            writer.write(bytes(1000))
            await writer.drain()
            await asyncio.sleep(0.01)

    return hang


async def test_one_failure_ends_the_other_fetches_of_its_call(room: MediaRoom) -> None:
    started = asyncio.Event()

    async def fail(request: Request, writer: asyncio.StreamWriter) -> None:
        await started.wait()
        writer.write(head(404, 0))

    async with web(endless(started)) as site, web(fail) as other:
        await refused(room, image(site.url()), image(other.url()))
        await site.gone.wait()


async def test_a_cancelled_call_stops_fetching_and_frees_its_bytes(room: MediaRoom) -> None:
    started = asyncio.Event()

    async with web(endless(started)) as site:
        task = asyncio.create_task(opened(room, image(site.url())))
        await started.wait()
        assert room.budget.held > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await site.gone.wait()
    assert room.budget.held == 0


async def stopped(room: MediaRoom) -> int:
    """Stop the one decoding process, so that what it is given next stays there."""
    await opened(room, image(saved(noise(4, 4))), fit=SQUARE)
    (pid,) = room.decoders.pids
    os.kill(pid, signal.SIGSTOP)
    return pid


async def until_busy(room: MediaRoom) -> None:
    while not room.decoders.busy:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_a_cancelled_call_stops_decoding(room: MediaRoom) -> None:
    pid = await stopped(room)
    task = asyncio.create_task(opened(room, image(photograph()), fit=SQUARE))
    await until_busy(room)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_gone(pid)
    assert len(await opened(room, image(photograph()), fit=SQUARE)) == 1


async def test_a_killed_decoder_ends_one_input_and_is_made_anew(room: MediaRoom) -> None:
    pid = await stopped(room)
    victim = asyncio.create_task(refused(room, image(photograph())))
    await until_busy(room)
    other = asyncio.create_task(opened(room, image(photograph("flower.jpg")), fit=SQUARE))
    os.kill(pid, signal.SIGKILL)
    assert "the decoder broke down on it" in await victim
    assert len(await other) == 1
    assert room.decoders.pids != [pid]


async def test_a_decoder_that_died_idle_is_not_noticed(room: MediaRoom) -> None:
    await opened(room, image(saved(noise(4, 4))), fit=SQUARE)
    (pid,) = room.decoders.pids
    os.kill(pid, signal.SIGKILL)
    await until_gone(pid)
    assert len(await opened(room, image(photograph()), fit=SQUARE)) == 1


async def test_the_kernel_ends_what_takes_too_long(make: Make) -> None:
    room = make(media_decoder_seconds=0.05, media_max_pixels=200_000_000)
    assert "it takes more than 0.05 seconds" in await refused(room, image(vast_png()))


async def test_a_picture_that_needs_too_much_memory_is_refused(make: Make) -> None:
    room = make(media_decoder_memory_bytes=1 << 28, media_max_pixels=200_000_000)
    assert "too much memory" in await refused(room, image(vast_png()))
    assert len(await opened(room, image(photograph()), fit=SQUARE)) == 1


async def test_a_pdf_gives_its_pages_in_order(room: MediaRoom) -> None:
    ((*pages,),) = await opened(room, Media(Modality.PDF, pdf(A4, (300.0, 200.0), A4)), fit=None)
    assert [page.source_size for page in pages] == [(1240, 1755), (625, 417), (1240, 1755)]
    assert pages[0].pixels[1400, 100].tolist() == [0, 200, 90]
    assert pages[2].pixels[1400, 200].tolist() == [60, 160, 90]


async def test_a_page_of_a_hundred_metres_is_drawn_small(room: MediaRoom) -> None:
    (((page),),) = await opened(room, Media(Modality.PDF, pdf((283_465.0, 283_465.0))), fit=SQUARE)
    assert page.source_size[0] * page.source_size[1] <= 20_000_000
    assert page.pixels.shape == (16, 16, 3)


async def test_all_pages_together_are_bounded_when_they_are_not_fitted(make: Make) -> None:
    room = make(media_max_pixels=3_000_000)
    media = Media(Modality.PDF, pdf(A4, A4))
    assert "its pages have more than 3,000,000 pixels together" in await refused(room, media, fit=None)
    assert len((await opened(room, media, fit=SQUARE))[0]) == 2


async def test_calls_wait_for_room_and_the_first_comes_first(make: Make) -> None:
    data = saved(noise(50, 50))
    room = make(media_bytes_in_flight=2 * (len(data) + SQUARE.side**2 * 3))
    order: list[int] = []

    async def call(number: int) -> None:
        async with room.open([("input", image(data))], SQUARE, Call("test")) as opening:
            ((one,), _) = opening.take(), opening.became(1)
            assert room.budget.held == len(data) + 1
            assert one.pixels.shape == (16, 16, 3)
            order.append(number)

    await asyncio.gather(*(call(number) for number in range(6)))
    assert order == sorted(order)
    assert room.budget.held == 0


async def test_a_call_larger_than_the_bound_runs_alone(make: Make) -> None:
    room = make(media_bytes_in_flight=1000)
    images = await opened(room, *[image(saved(noise(20, 20, seed))) for seed in range(30)], fit=SQUARE)
    assert len(images) == 30


async def test_one_who_waits_for_room_can_leave(make: Make) -> None:
    room = make(media_bytes_in_flight=1000)
    async with room.open([("input", image(saved(noise(20, 20))))], SQUARE, Call("test")):
        waiting = [asyncio.create_task(opened(room, image(photograph()), fit=SQUARE)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
    assert len(await waiting[1]) == len(await waiting[2]) == 1
    assert room.budget.held == 0


async def many_large(room: MediaRoom, calls: int, size: int) -> int:
    """Open ``calls`` fetched files of ``size`` bytes at once; the most bytes that were held."""
    data = saved(noise(64, 64), "BMP").ljust(size, b"\0")
    most = 0

    async def call() -> None:
        nonlocal most
        async with room.open([("input", image(site.url()))], SQUARE, Call("test")) as opening:
            most = max(most, room.budget.held + room.pixels.held)
            assert opening.take()[0].source_size == (64, 64)

    async with web(answer(data)) as site:
        await asyncio.gather(*(call() for _ in range(calls)))
    return most


async def test_many_large_files_at_once_stay_within_the_bound(make: Make) -> None:
    room = make(media_bytes_in_flight=4 << 20, media_max_bytes=1 << 20, media_decoders=2)
    assert await many_large(room, 24, 1 << 20) <= 4 << 20


@pytest.mark.soak
async def test_two_hundred_files_of_8_mb_stay_within_the_bound(make: Make) -> None:
    room = make(media_bytes_in_flight=64 << 20, media_fetch_seconds=300.0, media_decoders=2)
    await many_large(room, 4, 8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await many_large(room, 200, 8 << 20) <= 64 << 20
    # Beside what is counted, the sockets' buffers and the copy that goes through the pipe.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (3 * 64 << 20) >> 10


def told(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"searchfoundation_media_{name}", labels) or 0.0


async def test_fetches_and_decodings_are_counted(make: Make) -> None:
    started = asyncio.Event()
    room = make()
    outcomes = ("ok", "refused", "failed", "cancelled")
    before = [told("fetches_total", outcome=outcome) for outcome in outcomes]
    kinds = ("image", "pdf")
    decoded = [told("decode_seconds_count", kind=kind) for kind in kinds]
    async with web(answer(photograph())) as site, web(answer(b"", 404)) as missing:
        await opened(room, image(site.url()), Media(Modality.PDF, pdf(A4)), fit=SQUARE)
        await refused(room, image(missing.url()))
    async with web(answer(b"", 503)) as busy, web(endless(started)) as site:
        await refused(room, image(busy.url()))
        task = asyncio.create_task(opened(room, image(site.url())))
        await started.wait()
        assert told("bytes_in_flight") == room.budget.held > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [told("fetches_total", outcome=outcome) for outcome in outcomes] == [one + 1 for one in before]
    assert [told("decode_seconds_count", kind=kind) for kind in kinds] == [one + 1 for one in decoded]
    assert told("bytes_in_flight") == 0


async def test_decoders_that_are_started_again_are_counted(make: Make) -> None:
    room = make()
    before = told("decoders_restarted_total")
    pid = await stopped(room)
    assert told("decoders_restarted_total") == before
    victim = asyncio.create_task(refused(room, image(photograph())))
    await until_busy(room)
    os.kill(pid, signal.SIGKILL)
    await victim
    await opened(room, image(photograph()), fit=SQUARE)
    assert told("decoders_restarted_total") == before + 1


GDK_PIXBUF = Path("/usr/libexec/installed-tests/gdk-pixbuf")


@pytest.mark.soak
async def test_hostile_files_of_gdk_pixbuf_end_nothing_but_themselves(make: Make) -> None:
    """Those of Debian's gdk-pixbuf-tests: in ``fail`` all must be refused, none may hang or do more."""
    files = [path for path in GDK_PIXBUF.rglob("*") if path.is_file() and path.stat().st_size < 8 << 20]
    if not files:
        pytest.skip("gdk-pixbuf-tests is not installed")
    room = make(media_decoders=2)
    for path in files:
        with suppress(MediaError):
            await opened(room, image(path.read_bytes()), fit=SQUARE)
            assert "fail" not in path.parts, path
    assert len(await opened(room, image(photograph()), fit=SQUARE)) == 1


PHOTOS = [(640, 427), (1300, 900), (100, 77), (3000, 15), (13, 2000), (1, 1), (56, 84)]


async def test_pictures_and_pages_are_scaled_as_they_come(room: MediaRoom) -> None:
    wanted = Scaling(28, 3136, 602_112)
    sent = [noise(*size) for size in PHOTOS]
    found = await opened(room, *(image(saved(each)) for each in sent), fit=wanted)
    for picture, (one,) in zip(sent, found, strict=True):
        assert one.source_size == picture.size
        assert one.pixels.shape[1::-1] == wanted.size(*picture.size)
        planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()[None]
        made = interpolate(planes, size=one.pixels.shape[:2], mode="bicubic", antialias=True)
        assert np.array_equal(one.pixels, made[0].permute(1, 2, 0))
    # As they are, so many pages would have too many pixels.
    (pages,) = await opened(room, Media(Modality.PDF, pdf(*[A4] * 40)), fit=wanted)
    assert {page.pixels.shape for page in pages} == {(896, 644, 3)}
    assert room.budget.held == 0


@pytest.mark.parametrize("size", PHOTOS)
async def test_sizes_are_those_of_the_published_processor(size: tuple[int, int]) -> None:
    for limits in ((3136, 602_112), (262_144, 1_310_720)):
        for unit in (28, 32):
            height, width = smart_resize(size[1], size[0], unit, *limits)
            assert Scaling(unit, *limits).size(*size) == (width, height)


class Watched(ByteBudget):
    """Remembers the most that was held."""

    most = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "held":
            self.most = max(self.most, value)


async def test_pixels_of_all_decoders_together_are_bounded(make: Make) -> None:
    side = 400
    room = make(media_decoders=4, media_bytes_in_flight=4 * side**2 * 3)
    room.pixels = Watched(room.pixels.limit)
    sent = [image(saved(noise(side, side, seed))) for seed in range(12)]
    assert len(await opened(room, *sent, fit=SQUARE)) == 12
    assert len(await opened(room, *sent, fit=Scaling(28, 3136, 602_112))) == 12
    assert room.pixels.most == 2 * side**2 * 3
    assert room.pixels.held == 0


@pytest.mark.parametrize("kind", [Modality.IMAGE, Modality.PDF, Modality.VIDEO])
async def test_nothing_is_decoded_before_there_is_room_for_its_pixels(make: Make, kind: Modality) -> None:
    room = make()
    data = {Modality.IMAGE: saved(noise(40, 30)), Modality.PDF: pdf(A4), Modality.VIDEO: film(count=4)}[kind]
    fit = Scaling(28, 3136, 602_112, 32, 3136, 602_112)
    first = await room.pixels.reserve(room.pixels.limit)
    waiting = [asyncio.create_task(opened(room, Media(kind, data), fit=fit)) for _ in range(2)]
    await until_busy(room)
    (pid,) = room.decoders.pids
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    await until_gone(pid)
    await until_busy(room)
    assert not waiting[1].done()
    assert room.pixels.held == room.pixels.limit
    first.release()
    ((one, *_),) = await waiting[1]
    assert one is not None
    assert room.budget.held == room.pixels.held == 0


async def test_a_picture_larger_than_the_bound_is_counted_as_it_is(make: Make) -> None:
    room = make(media_bytes_in_flight=1000)
    room.pixels = Watched(room.pixels.limit)
    await opened(room, image(saved(noise(100, 50))), fit=SQUARE)
    assert room.pixels.most == 100 * 50 * 3
    assert room.pixels.held == 0

"""How much and how long a fetch may take."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import Callable
from contextlib import aclosing

import pytest

from services.core.media.fetching import Fetcher, FetchError, FetchLimits
from tests.media.web import Request, answer, head, web

Make = Callable[..., Fetcher]
LIMIT = 1 << 20


async def refused(fetcher: Fetcher, url: str, max_bytes: int = LIMIT) -> FetchError:
    with pytest.raises(FetchError) as told:
        await fetcher.read(url, max_bytes=max_bytes)
    return told.value


async def test_content_up_to_the_bound(local: Fetcher) -> None:
    body = bytes(range(256)) * 4096
    async with web(answer(body)) as site:
        assert await local.read(site.url(), max_bytes=len(body)) == body
        error = await refused(local, site.url(), len(body) - 1)
        assert "larger than 1,048,575 bytes" in error.detail
        assert not error.retryable


async def test_a_declared_size_is_believed_before_anything_is_read(local: Fetcher) -> None:
    async def promising(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 10**15))

    async with web(promising) as site:
        assert "larger than" in (await refused(local, site.url())).detail


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_endless_answer_is_cut_off(local: Fetcher, chunked: bool) -> None:
    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        encoding = {"Transfer_Encoding": "chunked"} if chunked else {}
        writer.write(head(200, None, **encoding))
        piece = b"x" * 65536
        while True:
            writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            await writer.drain()

    async with web(endless) as site:
        assert "larger than" in (await refused(local, site.url())).detail
        await site.gone.wait()


async def test_endless_headers_are_cut_off(local: Fetcher) -> None:
    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: " + b"y" * 8192 + b"\r\n")
            await writer.drain()

    async with web(endless) as site:
        assert (await refused(local, site.url())).retryable


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", head(200, 100) + b"half"])
async def test_a_silent_server_is_left(make: Make, sent: bytes) -> None:
    async def silent(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await asyncio.sleep(3600)

    fetcher = make("127.0.0.1/32", limits=FetchLimits(idle_seconds=0.2, total_seconds=60.0))
    async with web(silent) as site:
        error = await refused(fetcher, site.url())
        assert "took too long" in error.detail
        assert error.retryable


@pytest.mark.parametrize("part", ["head", "body"])
async def test_a_trickle_is_left_when_the_time_is_over(make: Make, part: str) -> None:
    async def trickle(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 10_000) if part == "body" else b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    fetcher = make("127.0.0.1/32", limits=FetchLimits(idle_seconds=30.0, total_seconds=0.5))
    async with web(trickle) as site:
        error = await refused(fetcher, site.url())
        assert "took too long" in error.detail
        assert not error.retryable


async def test_gzip_is_undone(local: Fetcher) -> None:
    body = b"".join(b"line %d\n" % number for number in range(20_000))
    members = gzip.compress(body[:1000]) + gzip.compress(body[1000:]) + b"\0" * 512
    async with web(answer(members, Content_Encoding="gzip")) as site:
        assert await local.read(site.url(), max_bytes=LIMIT) == body
        assert site.requests[0].headers["accept-encoding"] == "gzip"
    async with web(answer(members, Content_Type="application/gzip")) as site:
        assert await local.read(site.url(), max_bytes=LIMIT) == body
    async with web(answer(gzip.compress(members), Content_Encoding="gzip")) as site:
        assert await local.read(site.url(), max_bytes=LIMIT) == body


@pytest.mark.parametrize("header", [{"Content_Encoding": "gzip"}, {}])
async def test_a_gzip_bomb_unpacks_no_further_than_the_bound(local: Fetcher, header: dict[str, str]) -> None:
    bomb = gzip.compress(bytes(256 << 20), 9)
    assert len(bomb) < LIMIT
    async with web(answer(bomb, **header)) as site:
        tracemalloc.start()
        try:
            error = await refused(local, site.url())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert "unpacks to more than 1,048,576 bytes" in error.detail
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("body", "said", "retryable"),
    [
        (b"not gzip at all", "not valid gzip", False),
        (gzip.compress(b"x" * 100)[:-6], "breaks off", True),
        (gzip.compress(b"x" * 100) + b"tail", "not valid gzip", False),
    ],
    ids=["something else", "cut off", "with a tail"],
)
async def test_broken_gzip(local: Fetcher, body: bytes, said: str, retryable: bool) -> None:
    async with web(answer(body, Content_Encoding="gzip")) as site:
        error = await refused(local, site.url())
        assert said in error.detail
        assert error.retryable is retryable


async def test_other_encodings_are_not_guessed(local: Fetcher) -> None:
    async with web(answer(b"...", Content_Encoding="br")) as site:
        assert "encoding 'br'" in (await refused(local, site.url())).detail


@pytest.mark.parametrize(
    ("status", "retryable"),
    [
        (404, False),
        (403, False),
        (410, False),
        (204, False),
        (206, False),
        (429, True),
        (500, True),
        (503, True),
    ],
)
async def test_statuses(local: Fetcher, status: int, retryable: bool) -> None:
    async with web(answer(b"", status)) as site:
        error = await refused(local, site.url("/f.jsonl"))
        assert error.detail == f"Cannot fetch '{site.url('/f.jsonl')}': it answered with status {status}."
        assert error.retryable is retryable


async def test_an_answer_that_breaks_off(local: Fetcher) -> None:
    async def broken(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1000) + b"only this")
        writer.close()

    async with web(broken) as site:
        error = await refused(local, site.url())
        assert "connection broke" in error.detail
        assert error.retryable


async def test_nobody_listens(local: Fetcher) -> None:
    async with web(answer(b"")) as site:
        url = site.url()
    error = await refused(local, url)
    assert "no connection" in error.detail
    assert error.retryable


async def test_not_http(local: Fetcher) -> None:
    async def shell(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    async with web(shell) as site:
        assert "connection broke" in (await refused(local, site.url())).detail


async def test_a_reader_that_stops_early_ends_the_connection(local: Fetcher) -> None:
    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, None))
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with web(endless) as site:
        async with aclosing(local.stream(site.url(), max_bytes=1 << 40)) as pieces:
            async for _ in pieces:
                break
        await site.gone.wait()

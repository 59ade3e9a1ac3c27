"""Where a fetch may go: names, forms of addresses, redirects, names that change their address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.core.errors import ErrorCode
from services.core.media.fetching import Fetcher, FetchError
from tests.media.conftest import Names
from tests.media.web import Request, answer, head, web

Make = Callable[..., Fetcher]


async def fetch(fetcher: Fetcher, url: str) -> bytes:
    return await fetcher.read(url, max_bytes=1 << 20)


async def refused(fetcher: Fetcher, url: str) -> FetchError:
    with pytest.raises(FetchError) as told:
        await fetch(fetcher, url)
    assert told.value.code == ErrorCode.INPUT_INVALID
    return told.value


LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "localhost",
    "LOCALHOST",
    "%31%32%37.0.0.1",
    "127。0。0。1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:7f00:0001]",
]


@pytest.mark.parametrize("host", LOOPBACK)
async def test_every_form_of_loopback_is_refused(make: Make, host: str) -> None:
    async with web(answer(b"secret")) as site:
        error = await refused(make(), f"http://{host}:{site.port}/")
        assert not error.retryable
        assert not site.requests


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "017700000001", "[::ffff:127.0.0.1]"])
async def test_those_forms_do_lead_there_when_allowed(local: Fetcher, host: str) -> None:
    """Else the test above would pass for the wrong reason."""
    async with web(answer(b"open")) as site:
        assert await fetch(local, f"http://{host}:{site.port}/") == b"open"


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "10.0.0.5", "100.64.1.1", "fd00::1", "64:ff9b::a00:1", "2002:7f00:1::"]
)
async def test_a_name_that_leads_inside_is_refused(make: Make, names: Names, address: str) -> None:
    names.known["inside.example"] = [[address]]
    error = await refused(make(), "http://inside.example/")
    assert "not public" in error.detail
    assert address not in error.detail


async def test_one_inner_address_among_public_ones_is_enough(make: Make, names: Names) -> None:
    names.known["mixed.example"] = [["8.8.8.8", "10.0.0.5"]]
    assert "not public" in (await refused(make(), "http://mixed.example/")).detail


async def test_a_name_without_address(make: Make) -> None:
    error = await refused(make(), "http://nowhere.example/")
    assert error.detail == (
        "Cannot fetch 'http://nowhere.example/': the host 'nowhere.example' has no address."
    )


async def test_a_name_is_looked_up_once_and_the_connection_goes_there(make: Make, names: Names) -> None:
    async with web(answer(b"first")) as site, web(answer(b"second"), "127.0.0.9", site.port) as inner:
        names.known["turns.example"] = [["127.0.0.1"], ["127.0.0.9"]]
        fetcher = make("127.0.0.1/32")
        assert await fetch(fetcher, site.url(host="turns.example")) == b"first"
        assert names.asked == ["turns.example"]
        assert site.requests[0].headers["host"] == f"turns.example:{site.port}"
        assert not inner.requests


async def test_a_name_that_turns_inside_before_the_next_connection(make: Make, names: Names) -> None:
    names.known["turns.example"] = [["127.0.0.1"], ["127.0.0.9"]]

    async def closing(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 2, Connection="close") + b"ok")
        writer.close()

    async with web(closing) as site, web(answer(b"no"), "127.0.0.9", site.port) as inner:
        fetcher = make("127.0.0.1/32")
        await fetcher.check(site.url(host="turns.example"))
        await refused(fetcher, site.url(host="turns.example"))
        assert not inner.requests


async def test_the_next_address_is_tried_when_the_first_is_closed(local: Fetcher, names: Names) -> None:
    async with web(answer(b"here")) as site:
        names.known["two.example"] = [["127.0.0.2", "127.0.0.1"]]
        assert await fetch(local, site.url(host="two.example")) == b"here"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(local: Fetcher, status: int) -> None:
    async def turning(request: Request, writer: asyncio.StreamWriter) -> None:
        moved = request.target == "/old"
        writer.write(head(status, 0, Location="new?x=1") if moved else head(200, 3) + b"new")

    async with web(turning) as site:
        assert await fetch(local, site.url("/old")) == b"new"
        assert [request.target for request in site.requests] == ["/old", "/new?x=1"]


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://127.0.0.9/", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://[::ffff:10.0.0.1]/", "not public"),
        ("//10.0.0.1/", "not public"),
        ("file:///etc/passwd", "only http"),
        ("gopher://127.0.0.1/", "only http"),
        ("http://user:word@127.0.0.1/", "user name"),
        ("", "nowhere"),
        ("http://[", "valid URL"),
    ],
)
async def test_redirects_are_checked_like_the_first_url(make: Make, location: str, said: str) -> None:
    async with web(answer(b"", 302, Location=location)) as site:
        assert said in (await refused(make("127.0.0.1/32"), site.url())).detail


async def test_redirects_end(local: Fetcher) -> None:
    async with web(answer(b"", 302, Location="/again")) as site:
        assert "more than 3 times" in (await refused(local, site.url())).detail
        assert len(site.requests) == 4


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org/", "only http"),
        ("file:///etc/passwd", "only http"),
        ("s3://bucket/key", "only http"),
        ("data:text/plain,x", "only http"),
        ("example.org/file", "only http"),
        ("", "only http"),
        ("http://", "names no host"),
        ("http:///path", "names no host"),
        ("http://exa mple.org/", "not a valid URL"),
        ("http://example.org:99999/", "not a valid URL"),
        ("http://example.org:0/", "not a valid URL"),
        ("http://example.org/\n", "not a valid URL"),
        ("http://user@example.org/", "user name"),
        ("http://user:hidden@example.org/", "user name"),
        ("http://example.org/" + "a" * 9000, "longer than"),
    ],
)
async def test_urls_that_are_none(make: Make, names: Names, url: str, said: str) -> None:
    error = await refused(make(), url)
    assert said in error.detail
    assert "hidden" not in error.detail
    assert not names.asked


async def test_a_check_tells_the_same_without_connecting(local: Fetcher, make: Make) -> None:
    async with web(answer(b"x")) as site:
        await local.check(site.url())
        assert not site.requests
        with pytest.raises(FetchError, match="not public"):
            await make().check(site.url())
        with pytest.raises(FetchError, match="only http"):
            await make().check("gs://bucket/key")


async def test_proxy_variables_are_not_used(local: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    async with web(answer(b"proxied")) as proxy, web(answer(b"straight"), "127.0.0.2") as site:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())
        assert await fetch(local, site.url()) == b"straight"
        assert not proxy.requests


async def test_the_query_is_sent_but_not_told(local: Fetcher) -> None:
    async with web(answer(b"", 403)) as site:
        error = await refused(local, site.url("/f%2Fg?signature=a%2Bb%3D"))
        assert site.requests[0].target == "/f%2Fg?signature=a%2Bb%3D"
        assert "signature" not in error.detail

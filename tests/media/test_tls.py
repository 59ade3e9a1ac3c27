"""TLS over pinned connections: the certificate must be of the name, whatever address was taken."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.core.media.fetching import Fetcher, FetchError
from tests.gateway.certificates import Certificates
from tests.media.conftest import Names
from tests.media.web import Request, head, web

Make = Callable[..., Fetcher]


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certificates:
    made = Certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
    return made


@pytest.fixture
async def secure(authority: Certificates) -> AsyncIterator[int]:
    """The port of a server whose certificate is for ``localhost``; /down redirects to http."""
    pair = authority.make("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)

    async def handle(request: Request, writer: asyncio.StreamWriter) -> None:
        down = request.target == "/down"
        writer.write(head(302, 0, Location="http://localhost/") if down else head(200, 4) + b"safe")

    async with web(handle, tls=context) as site:
        yield site.port


async def test_the_name_is_checked_and_the_address_pinned(make: Make, names: Names, secure: int) -> None:
    names.known["localhost"] = [["127.0.0.1"]]
    fetcher = make("127.0.0.1/32")
    assert await fetcher.read(f"https://localhost:{secure}/", max_bytes=100) == b"safe"
    assert names.asked == ["localhost"]


async def test_a_certificate_of_another_name_is_not_taken(make: Make, names: Names, secure: int) -> None:
    names.known["other.example"] = [["127.0.0.1"]]
    with pytest.raises(FetchError, match="no connection could be made"):
        await make("127.0.0.1/32").read(f"https://other.example:{secure}/", max_bytes=100)


async def test_an_unknown_authority_is_not_taken(
    make: Make, names: Names, secure: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.known["localhost"] = [["127.0.0.1"]]
    monkeypatch.setenv("SSL_CERT_FILE", str(Certificates(tmp_path, "stranger").ca))
    with pytest.raises(FetchError, match="no connection could be made"):
        await make("127.0.0.1/32").read(f"https://localhost:{secure}/", max_bytes=100)


async def test_no_redirect_from_https_to_http(make: Make, names: Names, secure: int) -> None:
    names.known["localhost"] = [["127.0.0.1"]]
    with pytest.raises(FetchError, match="from https to http"):
        await make("127.0.0.1/32").read(f"https://localhost:{secure}/down", max_bytes=100)

"""The one way to a URL that a caller gave: guarded, pinned, bounded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpcore
import httpx

from services.core.media.connecting import GuardedBackend, Resolver, resolve
from services.core.media.decoding import bounded, decoded, gunzipped
from services.core.media.errors import FetchError
from services.core.settings import Settings

__all__ = ["FetchError", "FetchLimits", "Fetcher"]

_USER_AGENT = b"search-foundation"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_URL = 8192
_SHOWN = 200
_HOST = re.compile(rb"[0-9a-z._:-]+")
_RETRY_WORTH = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch: seconds to connect, without a byte, and in all; redirects followed."""

    connect_seconds: float = 10.0
    idle_seconds: float = 30.0
    total_seconds: float = 300.0
    redirects: int = 3


class Fetcher:
    """Fetches from public addresses and from SF_FETCH_ALLOW_NETWORKS; one per process, on its loop.

    A name is looked up once per connection and the connection goes to an address that was checked.
    Proxy variables, cookies and user names in URLs are never used. What fails raises FetchError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        limits: FetchLimits | None = None,
        resolver: Resolver = resolve,
        connections: int = 100,
    ) -> None:
        self._limits = limits or FetchLimits(total_seconds=settings.fetch_timeout_seconds)
        self._backend = GuardedBackend(settings.fetch_allow_networks, resolver)
        self._connections = connections
        self._pool: httpcore.AsyncConnectionPool | None = None

    async def check(self, url: str) -> None:
        """Raise FetchError if ``url`` is not one that would be fetched as of now; connects nowhere."""
        parsed = parse(url)
        try:
            async with asyncio.timeout(self._limits.connect_seconds):
                await self._backend.addresses(parsed.raw_host.decode(), _port(parsed))
        except TimeoutError as error:
            raise FetchError("looking up its host took too long", retryable=True, url=shown(url)) from error
        except FetchError as error:
            raise error.of(shown(url)) from error

    async def stream(self, url: str, *, max_bytes: int) -> AsyncGenerator[bytes]:
        """Give the content of ``url`` in pieces, gzip undone; neither side of that exceeds ``max_bytes``."""
        deadline = self._deadline()
        # What took all the time once would take it again.
        with _told(url, retry_late=False):
            async with AsyncExitStack() as stack:
                answer = await stack.enter_async_context(self._answer(url, deadline))
                _check_length(answer, max_bytes)
                pieces = await stack.enter_async_context(
                    aclosing(bounded(_content(answer, deadline), max_bytes))
                )
                encoding = _header(answer, b"content-encoding")
                if encoding in ("gzip", "x-gzip"):
                    pieces = await stack.enter_async_context(aclosing(decoded(pieces, max_bytes)))
                elif encoding not in ("", "identity"):
                    raise FetchError(f"its encoding '{encoding[:40]}' is not known", retryable=False)
                async for piece in await stack.enter_async_context(aclosing(gunzipped(pieces, max_bytes))):
                    yield piece

    async def read(self, url: str, *, max_bytes: int) -> bytes:
        """Give all of ``url``'s content; no more than ``max_bytes``."""
        async with aclosing(self.stream(url, max_bytes=max_bytes)) as pieces:
            return b"".join([piece async for piece in pieces])

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post ``body`` and give the status; what the answer says is not read, redirects are not followed."""
        with _told(url, retry_late=True):
            async with asyncio.timeout_at(self._deadline()):
                parsed = parse(url)
                answer = await self._send("POST", parsed, {**headers, "Content-Length": str(len(body))}, body)
                await answer.aclose()
                return answer.status

    async def aclose(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.aclose()
            self._pool = None

    @asynccontextmanager
    async def _answer(self, url: str, deadline: float) -> AsyncGenerator[httpcore.Response]:
        async with asyncio.timeout_at(deadline):
            answer = await self._follow(parse(url))
        try:
            if answer.status != HTTPStatus.OK:
                raise FetchError(
                    f"it answered with status {answer.status}", retryable=answer.status in _RETRYABLE
                )
            yield answer
        finally:
            await answer.aclose()

    async def _follow(self, url: httpx.URL) -> httpcore.Response:
        """Get ``url`` and where it redirects to; every address on the way is checked like the first."""
        for _ in range(self._limits.redirects + 1):
            answer = await self._send("GET", url, {"Accept-Encoding": "gzip"}, None)
            if answer.status not in _REDIRECTS:
                return answer
            await answer.aclose()
            secure = url.scheme == "https"
            url = parse(str(_joined(url, _header(answer, b"location", lower=False))))
            if secure and url.scheme != "https":
                raise FetchError("it redirects from https to http", retryable=False)
        raise FetchError(f"it redirects more than {self._limits.redirects} times", retryable=False)

    async def _send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes | None
    ) -> httpcore.Response:
        limits = self._limits
        timeouts = {
            "connect": limits.connect_seconds,
            "pool": limits.connect_seconds,
            "read": limits.idle_seconds,
            "write": limits.idle_seconds,
        }
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=[
                (b"Host", url.netloc),
                (b"User-Agent", _USER_AGENT),
                *((name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()),
            ],
            content=body,
            extensions={"timeout": timeouts},
        )
        return await self._open_pool().handle_async_request(request)

    def _open_pool(self) -> httpcore.AsyncConnectionPool:
        if self._pool is None:
            self._pool = httpcore.AsyncConnectionPool(
                # As httpx does it: the certificates of SSL_CERT_FILE, else those that come with certifi.
                ssl_context=httpx.create_ssl_context(),
                max_connections=self._connections,
                max_keepalive_connections=10,
                keepalive_expiry=10.0,
                network_backend=self._backend,
            )
        return self._pool

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._limits.total_seconds


async def _content(answer: httpcore.Response, deadline: float) -> AsyncGenerator[bytes]:
    pieces: AsyncIterator[bytes] = answer.aiter_stream().__aiter__()
    while True:
        async with asyncio.timeout_at(deadline):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


def parse(url: str) -> httpx.URL:
    """Read ``url``; FetchError unless it is a complete http(s) URL without a user name."""
    if len(url) > _MAX_URL:
        raise FetchError(f"the URL is longer than {_MAX_URL:,} characters", retryable=False)
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError("it is not a valid URL", retryable=False) from error
    if parsed.scheme not in ("http", "https"):
        raise FetchError("only http:// and https:// URLs are fetched", retryable=False)
    if not parsed.raw_host:
        raise FetchError("the URL names no host", retryable=False)
    if not _HOST.fullmatch(parsed.raw_host) or not 0 < _port(parsed) < 1 << 16:
        raise FetchError("it is not a valid URL", retryable=False)
    if parsed.userinfo:
        raise FetchError("a URL with a user name or password is not taken", retryable=False)
    return parsed


def shown(url: str) -> str:
    """Name ``url`` in a sentence: short, and without the parts that hold secrets."""
    plain = url.split("?", 1)[0].split("#", 1)[0]
    scheme, separator, rest = plain.partition("://")
    host, slash, path = rest.partition("/")
    safe = f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else plain
    return "".join(mark for mark in safe[:_SHOWN] if mark.isprintable())


def _port(url: httpx.URL) -> int:
    return url.port if url.port is not None else (443 if url.scheme == "https" else 80)


def _joined(url: httpx.URL, location: str) -> httpx.URL:
    if not location:
        raise FetchError("it redirects to nowhere", retryable=False)
    try:
        return url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError("it redirects to something that is not a URL", retryable=False) from error


def _header(answer: httpcore.Response, name: bytes, *, lower: bool = True) -> str:
    value = next((value for key, value in answer.headers if key.lower() == name), b"").decode("latin-1")
    return value.strip().lower() if lower else value.strip()


def _check_length(answer: httpcore.Response, max_bytes: int) -> None:
    declared = _header(answer, b"content-length")
    if declared.isdigit() and int(declared) > max_bytes:
        raise FetchError(f"it is larger than {max_bytes:,} bytes", retryable=False)


@contextmanager
def _told(url: str, *, retry_late: bool) -> Generator[None, Any, None]:
    """Turn what goes wrong into a FetchError that names the URL; ``retry_late``: also after all the time."""
    try:
        yield
    except FetchError as error:
        raise error.of(shown(url)) from error
    except TimeoutError as error:
        raise FetchError("it took too long", retryable=retry_late, url=shown(url)) from error
    except httpcore.TimeoutException as error:
        raise FetchError("it took too long", retryable=True, url=shown(url)) from error
    except httpcore.ConnectError as error:
        raise FetchError("no connection could be made", retryable=True, url=shown(url)) from error
    except _RETRY_WORTH as error:
        raise FetchError("the connection broke", retryable=True, url=shown(url)) from error

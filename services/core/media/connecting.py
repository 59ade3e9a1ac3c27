"""Connections that go to the very address that was checked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

import httpcore

from services.core.media.addresses import Network, permitted
from services.core.media.errors import FetchError

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host; raises OSError if there are none."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver, which also understands ``127.1``, ``0x7f000001`` and the like."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, refuses it unless all its addresses pass, and connects to one of these.

    TLS still checks the name: only the way to the host is pinned.
    """

    def __init__(self, allowed: Collection[Network], resolver: Resolver = resolve) -> None:
        self._allowed = tuple(allowed)
        self._resolver = resolver
        # Its type there is a union with what stands in for it when anyio is not installed.
        self._network: Any = httpcore.AnyIOBackend()

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses of ``host``; FetchError if there is none or one is not permitted."""
        try:
            found = await self._resolver(host, port)
        except (OSError, UnicodeError) as error:
            temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            raise FetchError(f"the host '{host[:100]}' has no address", retryable=temporary) from error
        if not found:
            raise FetchError(f"the host '{host[:100]}' has no address", retryable=False)
        if not all(permitted(address, self._allowed) for address in found):
            raise FetchError(
                f"the host '{host[:100]}' leads to an address that is not public", retryable=False
            )
        return found

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers; ``timeout`` is shared between them."""
        limit = 10.0 if timeout is None else timeout
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        try:
            async with asyncio.timeout(limit):
                found = await self.addresses(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("looking up the host took too long") from error
        failure: Exception | None = None
        for position, address in enumerate(found):
            share = max(end - loop.time(), 0.001) / (len(found) - position)
            try:
                return await self._network.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refuse: no URL leads to a socket file."""
        raise FetchError("a URL cannot name a socket file", retryable=False)

    async def sleep(self, seconds: float) -> None:
        """Wait between attempts."""
        await asyncio.sleep(seconds)

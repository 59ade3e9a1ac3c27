"""A small HTTP server for scrapers and probes: ``/metrics``, ``/live`` and ``/ready``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.core.serving.ports import PortInUseError

Render = Callable[[], Awaitable[bytes]]

_HEAD_BYTES = 16 << 10
_READ_SECONDS = 10.0
_JSON = "application/json"


async def own_metrics() -> bytes:
    """This process's metrics in the Prometheus text format."""
    return await asyncio.to_thread(generate_latest)


class Exposition:
    """Answers GET on its own port or Unix socket, one request per connection.

    ``ready`` is asked at each ``/ready``, which answers 200 or 503; ``/live`` answers as soon as the process
    runs its event loop.
    """

    def __init__(self, ready: Callable[[], bool], render: Render = own_metrics) -> None:
        self._ready = ready
        self._render = render
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on TCP; returns the port. Raises ``PortInUseError``."""
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=_HEAD_BYTES)
        except OSError as error:
            raise PortInUseError(host, port) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def start_unix(self, path: Path) -> None:
        """Listen on a Unix socket."""
        self._server = await asyncio.start_unix_server(self._answer, path, limit=_HEAD_BYTES)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                answer = await self._respond(head.split(b"\r\n", 1)[0])
                if head.startswith(b"HEAD "):
                    answer = answer[: answer.index(b"\r\n\r\n") + 4]
                writer.write(answer)
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # a peer that does not finish its request gets no answer
        finally:
            writer.close()

    async def _respond(self, request_line: bytes) -> bytes:
        method, _, rest = request_line.partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, _JSON, b'{"detail":"Only GET."}')
        if path == b"/metrics":
            return _response(HTTPStatus.OK, CONTENT_TYPE_LATEST, await self._render())
        if path == b"/live":
            return _response(HTTPStatus.OK, _JSON, b'{"status":"ok"}')
        if path == b"/ready":
            ready = self._ready()
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return _response(status, _JSON, b'{"status":"ok"}' if ready else b'{"status":"not ready"}')
        return _response(HTTPStatus.NOT_FOUND, _JSON, b'{"detail":"No such path."}')


def _response(status: HTTPStatus, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

"""An S3 emulator behind a front that refuses to store while it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler

import httpx
from moto.server import ThreadedMotoServer

from tests.threaded_http import serving

_HOP = frozenset({"connection", "content-length", "date", "server", "transfer-encoding"})


@dataclass
class Front:
    """``refusal`` is the status that PUT and POST get; None lets them through."""

    url: str = ""
    refusal: int | None = None


@contextmanager
def bucket(name: str = "files") -> Iterator[Front]:
    """Serve an empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Its first call imports what it emulates, for longer than httpx waits where much else runs.
    httpx.put(f"http://{host}:{port}/{name}", timeout=100).raise_for_status()
    front = Front()
    try:
        with _serving(front, host, port):
            yield front
    finally:
        server.stop()


@contextmanager
def _serving(front: Front, host: str, port: int) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            if front.refusal is not None and self.command in ("PUT", "POST"):
                self._answer(front.refusal, [], b"")
                return
            behind = HTTPConnection(host, port)
            headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
            behind.request(self.command, self.path, body, {**headers, "Host": f"{host}:{port}"})
            answer = behind.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())
            behind.close()

        do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers:
                if key.lower() not in _HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with serving(Handler) as front.url:
        yield

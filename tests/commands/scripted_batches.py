"""A server that answers the batch paths from a script, with faults that a real one has by chance only."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ID = "batch_0123"


def status(state: str, done: int = 0, failed: int = 0, total: int = 10, **more: Any) -> dict[str, Any]:
    stats = {"total": total, "completed": done, "failed": failed, "total_tokens": 7 * done}
    return {
        "batch_id": ID,
        "status": state,
        "model": "all-MiniLM-L6-v2",
        "created_at": "2026-01-15T10:30:00Z",
        "completed_at": None,
        "expires_at": "2026-01-16T10:30:00Z",
        "output_url": None,
        "error_file_url": None,
        "error": None,
        "stats": stats,
        **more,
    }


@dataclass
class ScriptedBatches:
    url: str = ""
    statuses: list[dict[str, Any] | int | None] = field(default_factory=list)
    """Answers to requests for the status, the last one stays; a number is an HTTP status, None hangs up."""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next downloads break off."""
    knows_offset: bool = True
    tells_length: bool = True
    pause: float = 0.0
    """Seconds between the pieces of a file."""
    refusal: tuple[int, dict[str, Any]] | None = None
    """Status and body of every answer."""
    calls: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    """Method, target, headers (lower case) and JSON body of each request."""
    asked: threading.Event = field(default_factory=threading.Event)
    """Set at the first request for a status or a file."""

    def offsets(self) -> list[int]:
        targets = [urlsplit(target) for _, target, _, _ in self.calls]
        return [
            int(parse_qs(target.query).get("offset", ["0"])[0])
            for target in targets
            if target.path.endswith(("/output", "/errors"))
        ]


class _Handler(BaseHTTPRequestHandler):
    script: ScriptedBatches
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_GET(self) -> None:
        self._handle(None)

    do_DELETE = do_GET  # noqa: N815

    def _handle(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.script.calls.append((self.command, self.path, headers, body))
        parts = urlsplit(self.path)
        if self.script.refusal is not None:
            self._json(*self.script.refusal)
        elif self.command == "POST":
            self._json(200, status("pending", total=0))
        elif self.command == "DELETE":
            self._json(200, status("cancelled", 4))
        elif parts.path == "/v1/batches":
            self._json(200, [status("processing", 3, 1), status("completed", 10)])
        elif parts.path == f"/v1/batch/{ID}":
            self._status()
        else:
            self._file(parts.path.rpartition("/")[2], parse_qs(parts.query).get("offset", ["0"])[0])

    def _status(self) -> None:
        self.script.asked.set()
        statuses = self.script.statuses
        now = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if now is None:
            self.close_connection = True
        elif isinstance(now, int):
            self._json(now, {"detail": "Service temporarily unavailable.", "code": "SERVICE_UNAVAILABLE"})
        else:
            self._json(200, now, {"Retry-After": "0"})

    def _file(self, name: str, offset: str) -> None:
        if name not in self.script.files:
            self._json(404, {"detail": "Not found.", "code": "RESOURCE_NOT_FOUND", "request_id": "req_1"})
            return
        content = self.script.files[name][int(offset) if self.script.knows_offset else 0 :]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        if self.script.tells_length:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        cut = self.script.cuts.pop(0) if self.script.cuts else None
        self.script.asked.set()
        self._pieces(content[:cut])
        if cut is not None:
            self.close_connection = True
        elif not self.script.tells_length:
            self.wfile.write(b"0\r\n\r\n")

    def _pieces(self, data: bytes) -> None:
        for piece in (data[:-100_000], data[-100_000:-1000], data[-1000:]):
            if piece:
                chunk = piece if self.script.tells_length else b"%x\r\n%b\r\n" % (len(piece), piece)
                self.wfile.write(chunk)
                self.wfile.flush()
            threading.Event().wait(self.script.pause)

    def _json(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextmanager
def scripted_batches() -> Iterator[ScriptedBatches]:
    script = ScriptedBatches()
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A loopback server that imitates the two hub endpoints a pull uses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The head of every branch; a commit that is asked for is taken to be there."""

_FILE = re.compile(r"/(?P<repository>.+)/resolve/(?P<commit>[0-9a-f]{40})/(?P<name>.+)")


@dataclass
class FakeHub:
    """``repositories`` maps a name to its files; the faults are set by the tests."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    licence: str = "apache-2.0"
    wrong_hash: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers with file bytes break off, one entry each."""
    stall_after: int | None = None
    """Bytes after which every answer with file bytes hangs until ``release``."""
    statuses: list[int] = field(default_factory=list)
    """Statuses that the next requests for files get instead."""
    keeps_pins: bool = True
    """Whether a commit that is asked for is the one that is answered."""
    release: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every request."""

    def downloads(self, name: str) -> list[str | None]:
        """Ranges asked of the file ``name``, in order."""
        asked = [(_FILE.fullmatch(path), ranged) for path, ranged in self.requests]
        return [ranged for found, ranged in asked if found and found["name"] == name]

    def describe(self, repository: str, revision: str) -> dict[str, Any]:
        files = self.repositories[repository]
        siblings = [self._sibling(name, content) for name, content in files.items()]
        commit = revision if self.keeps_pins and len(revision) == len(COMMIT) else COMMIT
        return {"sha": commit, "cardData": {"license": self.licence}, "siblings": siblings}

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
        if name.endswith(".safetensors"):
            digest = "0" * 64 if name in self.wrong_hash else hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
        return entry


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if repository not in self.hub.repositories:
                self._answer(401, b"{}")
            else:
                self._answer(200, json.dumps(self.hub.describe(repository, revision)).encode())
            return
        found = _FILE.fullmatch(path)
        repository, name = (found["repository"], found["name"]) if found else ("", "")
        if self.hub.statuses:
            self._answer(self.hub.statuses.pop(0), b"")
        elif name not in self.hub.repositories.get(repository, {}):
            self._answer(404, b"")
        else:
            self._file(self.hub.repositories[repository][name])

    def _file(self, content: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(content) > 0:
            self._answer(416, b"")
            return
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.hub.cuts:
            self.wfile.write(rest[: self.hub.cuts.pop(0)])
            self.close_connection = True
            return
        if self.hub.stall_after is not None and len(rest) > self.hub.stall_after:
            self.wfile.write(rest[: self.hub.stall_after])
            self.wfile.flush()
            self.hub.release.wait(60)
            self.close_connection = True
            return
        self.wfile.write(rest)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()

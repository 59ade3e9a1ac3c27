"""A plain HTTP/1.1 client that hides nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    def error(self) -> tuple[int, str]:
        """Status and code, after checking the documented shape."""
        body = self.json
        assert set(body) >= {"detail", "code", "request_id", "error"}, body
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"] == body["detail"]
        assert isinstance(body["detail"], str)
        assert body["request_id"] == self.headers.get("x-request-id")
        return self.status, body["code"]


def call(
    port: int,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float = 120.0,
) -> Answer:
    """One request on a connection of its own; an iterable body is sent in chunks."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        try:
            chunked = body is not None and not isinstance(body, bytes)
            connection.request(method, path, body, dict(headers or {}), encode_chunked=chunked)
        except (BrokenPipeError, ConnectionResetError):
            # The gateway answered before it had read all, and closed.
            pass
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())
    finally:
        connection.close()


def post(
    port: int, body: Any, headers: Mapping[str, str] | None = None, path: str = "/v1/embeddings"
) -> Answer:
    """POST bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(port, "POST", path, data, {"content-type": "application/json", **(headers or {})})


def get(port: int, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    return call(port, "GET", path, headers=headers)


def raw(port: int, data: bytes, *, timeout: float = 120.0) -> bytes:
    """Send bytes, and read until the gateway closes, which resets if it has not read all of them."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection,
        suppress(ConnectionError),
    ):
        connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    return received


def http2_frames(port: int, body: bytes) -> list[tuple[int, bytes]]:
    """POST embeddings over HTTP/2 without TLS; type and payload of every frame that comes back."""

    def field(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload

    pseudo = {b":method": b"POST", b":scheme": b"http", b":path": b"/v1/embeddings", b":authority": b"x"}
    headers = b"".join(field(name, value) for name, value in pseudo.items())
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    sent += frame(1, 4, 1, headers) + frame(0, 1, 1, body)
    frames: list[tuple[int, bytes]] = []
    with socket.create_connection(("127.0.0.1", port), timeout=100) as connection:
        connection.sendall(sent)
        received = connection.makefile("rb")
        while True:
            head = received.read(9)
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:])
            frames.append((kind, received.read(int.from_bytes(head[:3]))))
            if stream == 1 and flags & 1:
                return frames

"""A plain HTTP/1.1 client that hides nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
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
        assert set(body) >= {"detail", "code", "request_id"}, body
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
    timeout: float = 30.0,
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


def raw(port: int, data: bytes, *, timeout: float = 10.0) -> bytes:
    """Send bytes, and read until the gateway closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received

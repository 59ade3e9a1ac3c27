"""Ports: checked before the models load, and shared between workers."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path


class PortInUseError(Exception):
    """An address to listen on is taken; the text is a sentence for the operator."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"Cannot listen on {join(host, port)}: the address is taken or not one of this host."
        )


def join(host: str, port: int) -> str:
    """Write ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raise ``PortInUseError`` if nobody could listen there now; port 0 always passes."""
    if port:
        _bind(host, port, shared=False).close()


def reserve_shared(host: str, port: int) -> socket.socket:
    """Bind a port that several processes will listen on, and hold it; port 0 takes a free one.

    The socket itself never listens, so it gets no connections. Raises ``PortInUseError``.
    """
    check_free(host, port)
    return _bind(host, port, shared=True)


def write_ports_file(path: Path, grpc_port: int, metrics_port: int) -> None:
    """Tell other programs the bound ports: a JSON file that is whole whenever it is there."""
    content = {"grpc_port": grpc_port, "metrics_port": metrics_port, "pid": os.getpid()}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(content) + "\n")
    fresh.replace(path)


def _bind(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortInUseError(host, port) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise PortInUseError(host, port) from error
    return bound

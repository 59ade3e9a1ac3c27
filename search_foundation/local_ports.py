"""The ports of everything that ``up`` starts: free ones, before anything is started."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

from services.core.settings import ConfigurationError, Settings

_LOOPBACK = "127.0.0.1"
PORTS = ("http_port", "grpc_port", "metrics_port", "admin_port")
_NEXT = 100
"""Ports tried behind a default that is taken."""


def settle_ports(settings: Settings) -> Settings:
    """Replace each port 0 by a free one, and each that is taken and that nobody has set by the next free one.

    Raises ConfigurationError for a port that was set and is taken.
    """
    update: dict[str, int] = {}
    for name in PORTS:
        host = settings.host if name == "http_port" else _LOOPBACK
        port: int = getattr(settings, name)
        if name not in settings.model_fields_set:
            port = _first_free(host, port, set(update.values()))
        update[name] = _bound(host, port, f"SF_{name.upper()}")
    if len(set(update.values())) < len(update):
        raise ConfigurationError(f"Two of {', '.join(f'SF_{name.upper()}' for name in PORTS)} are the same.")
    return settings.model_copy(update=update)


def _first_free(host: str, port: int, given: set[int]) -> int:
    """The first port from ``port`` on that can be had; ``port`` itself when none can, for the error."""
    candidates: Iterator[int] = (each for each in range(port, port + _NEXT) if each not in given)
    return next((each for each in candidates if not _taken(host, each)), port)


def _taken(host: str, port: int) -> bool:
    try:
        _probe(host, port)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _bound(host: str, port: int, variable: str) -> int:
    try:
        return _probe(host, port)
    except socket.gaierror as error:
        raise ConfigurationError(
            f"Cannot listen on {host}: {error.strerror}. Choose an address of this machine with SF_HOST."
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {host} port {port}: {error.strerror}. "
            f"Stop what listens there, or choose another port with {variable}."
        ) from error


def _probe(host: str, port: int) -> int:
    """Bind for a moment; returns the port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return probe.getsockname()[1]

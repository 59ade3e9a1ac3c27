"""The ports of everything that ``up`` starts: free ones, before anything is started."""

from __future__ import annotations

import socket

from services.core.settings import ConfigurationError, Settings

_LOOPBACK = "127.0.0.1"
_PORTS = ("http_port", "grpc_port", "metrics_port", "admin_port")


def settle_ports(settings: Settings) -> Settings:
    """Replace each port 0 by a free one; raises ConfigurationError for a port that is taken."""
    update: dict[str, int] = {}
    for name in _PORTS:
        host = settings.host if name == "http_port" else _LOOPBACK
        update[name] = _settle(host, getattr(settings, name), f"SF_{name.upper()}")
    if len(set(update.values())) < len(update):
        raise ConfigurationError(f"Two of {', '.join(f'SF_{name.upper()}' for name in _PORTS)} are the same.")
    return settings.model_copy(update=update)


def _settle(host: str, port: int, variable: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ConfigurationError(
                f"Cannot listen on {host}: {error.strerror}. Choose an address of this machine with SF_HOST."
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"Cannot listen on {host} port {port}: {error.strerror}. "
                f"Stop what listens there, or choose another port with {variable}."
            ) from error
        return probe.getsockname()[1]

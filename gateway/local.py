"""The topology of one machine, from the settings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import yaml
from pydantic import ValidationError

from gateway.contract import has_services
from gateway.topology import Topology, parse
from services.core.catalog.types import Capability
from services.core.settings import ConfigurationError, Settings

LOOPBACK = "127.0.0.1"
_EVERYWHERE = {"0.0.0.0": LOOPBACK, "::": "[::1]"}


def local_topology(
    settings: Settings,
    capabilities: Iterable[Capability],
    *,
    services: str | None = None,
) -> Topology:
    """One pool: the service process of this machine, on the address ``services`` or the settings' host.

    ``SF_GATEWAY_FILE`` may say anything else; its keys are merged over what the settings give, lists
    replaced. Raises ConfigurationError.
    """
    services = services or _EVERYWHERE.get(settings.host, settings.host)
    document: dict[str, Any] = {
        "listener": {"host": settings.host, "port": settings.http_port},
        "admin": {"host": LOOPBACK, "port": settings.admin_port},
        "pools": [
            {
                "name": "local",
                "capabilities": [str(name) for name in capabilities],
                "models": list(settings.models),
                "addresses": [f"{services}:{settings.grpc_port}"],
            }
        ],
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_text_body_bytes": settings.max_text_body_bytes,
        },
        "timeouts": {"request": settings.request_timeout_seconds, "drain": settings.drain_seconds},
        "access_log": "stdout" if settings.access_log else None,
        "log_format": "text" if settings.logs_text(sys.stderr) else "json",
    }
    own = _read(settings)
    try:
        topology = parse(_merged(document, own))
    except ValidationError as error:
        where = f" of {settings.gateway_file}" if own else ""
        raise ConfigurationError(f"Wrong gateway settings{where}: {_sentence(error)}.") from error
    missing = [str(c) for c in topology.capabilities if not has_services(c)]
    if missing:
        raise ConfigurationError(f"This version has no service for {', '.join(missing)}.")
    if settings.tls_cert is not None and topology.services_tls is None:
        raise ConfigurationError(
            "SF_TLS_CERT makes the services speak TLS: SF_GATEWAY_FILE must say under services_tls whom the "
            "gateway trusts."
        )
    return topology


def _read(settings: Settings) -> dict[str, Any]:
    path = settings.gateway_file
    if path is None:
        return {}
    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"Cannot read the gateway file {path}: {error}.") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigurationError(f"The gateway file {path} must hold a mapping of names to values.")
    return cast("dict[str, Any]", document)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _merged(cast("dict[str, Any]", below), cast("dict[str, Any]", value))
        result[key] = value
    return result


def _sentence(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'topology'}: {item['msg']}" for item in problems)

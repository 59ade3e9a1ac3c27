"""The one topology: which pools exist, where they listen and what the gateway allows.

Written by `search-foundation up`, or made from Helm values; everything the gateway does follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.core.catalog.types import Capability

LogTarget = Literal["stdout", "stderr"] | Path
LogFormat = Literal["json", "text"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Address:
    """Where one endpoint listens: ``host:port``, ``[v6]:port`` or ``unix:/path``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read the written form; raises ValueError naming the text."""
        if text.startswith("unix:"):
            return cls(path=text.removeprefix("unix:").removeprefix("//"))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"'{text}' is not an address: write host:port or unix:/path")
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ServerTls(_Part):
    """Certificate that a listener shows; with ``client_ca`` it asks callers for theirs."""

    certificate: Path
    private_key: Path
    client_ca: Path | None = None


class ClientTls(_Part):
    """How the gateway calls the services: whom it trusts, and its own certificate for mTLS.

    ``server_name`` is the name their certificate must bear; the address's host when unset.
    """

    ca: Path
    certificate: Path | None = None
    private_key: Path | None = None
    server_name: str | None = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together")
        return self


class Listener(_Part):
    """One port the gateway listens on."""

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)
    tls: ServerTls | None = None


class Pool(_Part):
    """Endpoints that serve the same models for the same capabilities.

    A request goes to the pool of its capability that names its model, one without a known model to the
    first pool of the capability, which answers with what it serves. Several pools may name one model: they
    share its calls by ``weight``, and one that is not healthy leaves its share to the others. A weight of 0
    is a pool that stands by for them.

    Endpoints are ``addresses``, or those of a Kubernetes ``service`` (``name:port``) of the pod's namespace,
    as its API tells them. ``server_name`` is the name in their certificate, that of the topology or the
    first address's host when unset.
    """

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    capabilities: tuple[Capability, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    addresses: tuple[str, ...] = ()
    service: str | None = Field(default=None, pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?:[0-9]{1,5}$")
    server_name: str | None = None
    weight: int = Field(default=100, ge=0, le=1_000_000)

    @field_validator("addresses")
    @classmethod
    def _addresses_parse(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Address.parse(address)) for address in addresses)

    @model_validator(mode="after")
    def _has_endpoints(self) -> Self:
        if bool(self.addresses) == bool(self.service):
            raise ValueError("give addresses or a service")
        return self

    @property
    def endpoints(self) -> tuple[Address, ...]:
        """The addresses, parsed."""
        return tuple(Address.parse(address) for address in self.addresses)


@dataclass(frozen=True, slots=True)
class Share:
    """Models whose calls the same pools share; the pool that was written first comes first."""

    models: tuple[str, ...]
    pools: tuple[Pool, ...]

    def ways(self) -> tuple[tuple[Pool, ...], ...]:
        """The pools to try for a call, in turn, one way for each pool that takes calls of its own."""
        own = [pool for pool in self.pools if pool.weight]
        by_weight = sorted(self.pools, key=lambda pool: -pool.weight)
        return tuple((first, *(pool for pool in by_weight if pool != first)) for first in own)


class GatewayLimits(_Part):
    """What callers and pools may take.

    Envoy buffers both directions alike, so answers may be as large as the greater of the first two.
    """

    max_body_bytes: int = Field(default=64 << 20, ge=1)
    max_text_body_bytes: int = Field(default=16 << 20, ge=1, description="Of a call that carries only texts.")
    max_response_bytes: int = Field(default=256 << 20, ge=1)
    max_header_kib: int = Field(default=60, ge=1, le=8192)
    max_headers: int = Field(default=1_000, ge=1)
    max_connections: int = Field(default=10_000, ge=1)
    max_requests_per_pool: int = Field(default=2_048, ge=1, description="In flight; above it calls get 503.")
    max_heap_bytes: int = Field(default=4 << 30, ge=1 << 26)


class Timeouts(_Part):
    """All in seconds."""

    request: float = Field(default=60.0, gt=0, description="From complete request to complete answer.")
    receive: float = Field(default=60.0, gt=0, description="For a caller to send all of a request.")
    headers: float = Field(default=10.0, gt=0, description="For a caller to send the headers.")
    idle: float = Field(default=300.0, gt=0, description="Connection without a request.")
    connect: float = Field(default=1.0, gt=0, description="Connecting to an endpoint.")
    drain: float = Field(default=5.0, ge=0, description="New connections are still taken when stopping.")


class HealthCheck(_Part):
    """Active gRPC health checks of every endpoint. Times in seconds.

    Every gateway asks every endpoint. Where somebody else says who is ready, as for pools of a Kubernetes
    Service, ``active`` may be false: then only what fails is put aside.
    """

    active: bool = True
    interval: float = Field(default=2.0, gt=0)
    unhealthy_interval: float = Field(default=0.5, gt=0, description="While an endpoint does not serve.")
    timeout: float = Field(default=1.0, gt=0)
    unhealthy_after: int = Field(default=2, ge=1)


class Cors(_Part):
    """Browsers' origins that may call; ``*`` for any. Credentials (cookies) are never allowed."""

    origins: tuple[str, ...] = ("*",)
    max_age: int = Field(default=86_400, ge=0, description="Seconds a browser may keep the answer.")


class Topology(_Part):
    """Everything the gateway's configuration is made from.

    ``grpc_listener`` opens a port for gRPC alone; the main listener takes gRPC calls too. ``admin`` is for
    this machine only; ``metrics`` opens a port with Envoy's statistics for Prometheus and nothing else.
    ``workers`` are Envoy's threads. ``trusted_proxies`` counts the proxies in front whose X-Forwarded-For is
    believed.
    """

    listener: Listener
    grpc_listener: Listener | None = None
    admin: Listener | None = None
    metrics: Listener | None = None
    pools: tuple[Pool, ...] = Field(min_length=1)
    services_tls: ClientTls | None = None
    limits: GatewayLimits = GatewayLimits()
    timeouts: Timeouts = Timeouts()
    health_check: HealthCheck = HealthCheck()
    cors: Cors = Cors()
    compression: bool = False
    workers: int = Field(default=1, ge=1)
    trusted_proxies: int = Field(default=0, ge=0)
    access_log: LogTarget | None = "stdout"
    log_format: LogFormat = "json"

    @model_validator(mode="after")
    def _each_model_has_a_pool_that_takes_calls(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError("pool names must differ")
        for capability in Capability:
            for share in self.shares_of(capability):
                if not share.ways():
                    pools = "', '".join(pool.name for pool in share.pools)
                    raise ValueError(
                        f"pools '{pools}' have weight 0 and nobody takes {share.models[0]} for {capability}"
                    )
        return self

    @model_validator(mode="after")
    def _metrics_come_from_admin(self) -> Self:
        if self.metrics is not None and self.admin is None:
            raise ValueError("metrics needs admin, where the statistics come from")
        return self

    def pools_of(self, capability: Capability) -> tuple[Pool, ...]:
        """The pools that serve a capability, the default one first."""
        return tuple(pool for pool in self.pools if capability in pool.capabilities)

    def shares_of(self, capability: Capability) -> tuple[Share, ...]:
        """The models of a capability by the pools that share them, those of the default pool first."""
        pools: dict[str, tuple[Pool, ...]] = {}
        for pool in self.pools_of(capability):
            for model in pool.models:
                pools[model] = (*pools.get(model, ()), pool)
        models: dict[tuple[Pool, ...], tuple[str, ...]] = {}
        for model, sharing in pools.items():
            models[sharing] = (*models.get(sharing, ()), model)
        return tuple(Share(names, sharing) for sharing, names in models.items())

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Every capability that some pool serves, in a stable order."""
        return tuple(c for c in Capability if self.pools_of(c))

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that some pool serves, in the order written, once."""
        return tuple(dict.fromkeys(model for pool in self.pools for model in pool.models))


def parse(document: Mapping[str, Any]) -> Topology:
    """Make a topology from plain data; raises pydantic's ValidationError."""
    return Topology.model_validate(document)


def load(path: Path) -> Topology:
    """Read a topology from a YAML file; raises OSError, YAMLError or ValidationError."""
    return parse(yaml.safe_load(path.read_text(encoding="utf-8")) or {})

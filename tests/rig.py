"""A real server in this process, with the real engine and model, and what tests ask of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np
import orjson
import torch
from grpc_status import rpc_status

from services.core.access import AccessControl, Principal
from services.core.access.limits import Lease
from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.errors import ServiceError
from services.core.inference import Engine
from services.core.inference.loading import load_model
from services.core.media.room import MediaRoom
from services.core.serving.capability import ServingCapability
from services.core.serving.server import Server
from services.core.settings import Settings

MINILM = "all-MiniLM-L6-v2"
ALIAS = "house-model"

Build = Callable[[Engine, Catalog, Settings], ServingCapability]


class Turnstile(AccessControl):
    """The real one without keys; writes down what calls are charged, and raises ``refuse`` when it is set."""

    charged: list[int]
    refuse: ServiceError | None

    async def charge(self, principal: Principal, lease: Lease | None, tokens: int) -> None:
        if self.refuse is not None:
            raise self.refuse
        await super().charge(principal, lease, tokens)
        self.charged.append(tokens)

    def reset(self) -> None:
        self.charged, self.refuse = [], None


@dataclass
class Serving:
    """A running server and a channel to it."""

    engine: Engine
    catalog: Catalog
    access: Turnstile
    channel: grpc.aio.Channel


def settings(**values: Any) -> Settings:
    """Settings of a server of one test module: free port, no keys, fp32."""
    common = {
        "models": (MINILM,),
        "dtype": "float32",
        "auth": False,
        "grpc_port": 0,
        "drain_seconds": 0,
        "access_log": False,
    }
    return Settings(**{**common, **values})


class _WithoutNumbers:
    """The real network, but for what it computes."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, batch: Any) -> list[np.ndarray]:
        return [np.full_like(result, np.nan) for result in self._network.forward(batch)]


def load_without_numbers(spec: ModelSpec, chosen: Settings, device: torch.device) -> Any:
    """Load a model whose results are not numbers."""
    return _WithoutNumbers(load_model(spec, chosen, device))


@asynccontextmanager
async def serving(build: Build, chosen: Settings) -> AsyncIterator[Serving]:
    """Serve one capability; the model is also known as ``ALIAS``."""
    catalog = Catalog.load(aliases={ALIAS: MINILM})
    media = MediaRoom(chosen)
    engine = await Engine.start(chosen, catalog, opener=media)
    access = await Turnstile.open(chosen)
    access.reset()
    server = Server(chosen, [build(engine, catalog, chosen)], engine, access)
    await server.start()
    try:
        options = (("grpc.max_receive_message_length", -1),)
        async with grpc.aio.insecure_channel(server.address, options) as channel:
            yield Serving(engine, catalog, access, channel)
    finally:
        await server.stop(drain=False)
        await access.close()
        await engine.stop(5.0)
        await media.aclose()


def told(error: grpc.aio.AioRpcError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a failed call of a REST service, as the gateway would answer them."""
    trailing = dict(error.trailing_metadata())
    return int(trailing["sf-http-status"]), orjson.loads(trailing["sf-http-body"])


def detail(error: grpc.aio.AioRpcError, kind: type[Any]) -> Any:
    """The ``google.rpc`` detail of a kind in a failure."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    raise AssertionError(f"no {kind.__name__} among the details")

"""A real server with the real engine and all-MiniLM-L6-v2 in fp32, once per module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc.aio
import pytest
import pytest_asyncio
from searchfoundation.v1 import embed_pb2_grpc, embed_rest_pb2_grpc

from services.core.access import AccessControl, Principal
from services.core.access.limits import Lease
from services.core.catalog import Catalog
from services.core.errors import ServiceError
from services.core.inference import Engine
from services.core.serving.server import Server
from services.core.settings import Settings
from services.embed.capability import build

ALIAS = "house-model"
SETTINGS = Settings(
    models=("all-MiniLM-L6-v2",),
    dtype="float32",
    auth=False,
    grpc_port=0,
    drain_seconds=0,
    access_log=False,
    max_items=400,
)


class Turnstile(AccessControl):
    """The real one without keys; writes down what calls are charged, and raises ``refuse`` when it is set."""

    charged: list[int]
    refuse: ServiceError | None

    async def charge(self, principal: Principal, lease: Lease | None, tokens: int) -> None:
        if self.refuse is not None:
            raise self.refuse
        await super().charge(principal, lease, tokens)
        self.charged.append(tokens)


@dataclass
class Rig:
    """What a test talks to."""

    engine: Engine
    catalog: Catalog
    access: Turnstile
    typed: embed_pb2_grpc.EmbedServiceAsyncStub
    rest: embed_rest_pb2_grpc.EmbedRestServiceAsyncStub
    channel: grpc.aio.Channel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig() -> AsyncIterator[Rig]:
    catalog = Catalog.load(aliases={ALIAS: "all-MiniLM-L6-v2"})
    engine = await Engine.start(SETTINGS, catalog)
    access = await Turnstile.open(SETTINGS)
    access.charged, access.refuse = [], None
    server = Server(SETTINGS, [build(engine, catalog, SETTINGS)], engine, access)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            typed = embed_pb2_grpc.EmbedServiceStub(channel)
            rest = embed_rest_pb2_grpc.EmbedRestServiceStub(channel)
            yield Rig(engine, catalog, access, typed, rest, channel)  # type: ignore[arg-type]
    finally:
        await server.stop(drain=False)
        await access.close()
        await engine.stop(5.0)


@pytest.fixture(autouse=True)
def fresh_turnstile(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames:
        access: Turnstile = request.getfixturevalue("rig").access
        access.charged.clear()
        access.refuse = None

"""A real server with the real engine and all-MiniLM-L6-v2 in fp32, once per module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc.aio
import pytest
import pytest_asyncio
from searchfoundation.v1 import embed_pb2_grpc, embed_rest_pb2_grpc

from services.core.catalog import Catalog
from services.core.inference import Engine
from services.embed.capability import build
from tests.rig import Turnstile, serving, settings

SETTINGS = settings(max_items=400)


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
    async with serving(build, SETTINGS) as up:
        typed = embed_pb2_grpc.EmbedServiceStub(up.channel)
        rest = embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel)
        yield Rig(up.engine, up.catalog, up.access, typed, rest, up.channel)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fresh_turnstile(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames and isinstance(rig := request.getfixturevalue("rig"), Rig):
        rig.access.reset()

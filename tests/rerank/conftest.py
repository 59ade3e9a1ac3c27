"""A real server with the real engine and all-MiniLM-L6-v2 in fp32, once per module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc.aio
import pytest
import pytest_asyncio
from searchfoundation.v1 import rerank_pb2_grpc, rerank_rest_pb2_grpc

from services.core.inference import Engine
from services.rerank.capability import build
from tests.rig import Turnstile, serving, settings

SETTINGS = settings(max_documents=400, max_body_bytes=1 << 20, request_timeout_seconds=20.0)


@dataclass
class Rig:
    """What a test talks to."""

    engine: Engine
    access: Turnstile
    typed: rerank_pb2_grpc.RerankServiceAsyncStub
    rest: rerank_rest_pb2_grpc.RerankRestServiceAsyncStub
    channel: grpc.aio.Channel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig() -> AsyncIterator[Rig]:
    async with serving(build, SETTINGS) as up:
        typed = rerank_pb2_grpc.RerankServiceStub(up.channel)
        rest = rerank_rest_pb2_grpc.RerankRestServiceStub(up.channel)
        yield Rig(up.engine, up.access, typed, rest, up.channel)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fresh_turnstile(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames:
        request.getfixturevalue("rig").access.reset()

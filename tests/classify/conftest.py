"""A real server with the real engine, all-MiniLM-L6-v2 in fp32 and a SQLite file, once per module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import orjson
import pytest
import pytest_asyncio
from google.api import httpbody_pb2
from searchfoundation.v1 import classify_pb2_grpc, classify_rest_pb2, classify_rest_pb2_grpc

from services.classify.capability import ClassifyCapability
from services.core.catalog import Catalog
from services.core.inference import Engine
from services.core.settings import Settings
from services.core.storage import Database
from tests.rig import MINILM, Turnstile, serving, settings, told


@dataclass
class Rig:
    """What a test talks to."""

    engine: Engine
    access: Turnstile
    database: Database
    typed: classify_pb2_grpc.ClassifyServiceAsyncStub
    rest: classify_rest_pb2_grpc.ClassifyRestServiceAsyncStub
    channel: grpc.aio.Channel

    async def classify(self, **fields: Any) -> dict[str, Any]:
        return _json(await self.rest.Classify(_body({"input": "hello"} | fields)))

    async def train(self, **fields: Any) -> dict[str, Any]:
        return _json(await self.rest.Train(_body(fields)))

    async def new(self, *labels: str, **fields: Any) -> str:
        """Train a small private classifier; returns its id."""
        examples = [{"text": f"this is about {label}", "label": label} for label in labels or ("cat", "dog")]
        made = await self.train(**{"model": MINILM, "input": examples, "access": "private"} | fields)
        return made["classifier_id"]

    async def listed(self) -> list[dict[str, Any]]:
        return _json(await self.rest.ListClassifiers(httpbody_pb2.HttpBody()))

    async def delete(self, classifier_id: str) -> dict[str, Any]:
        request = classify_rest_pb2.DeleteClassifierByPathRequest(classifier_id=classifier_id)
        return _json(await self.rest.DeleteClassifier(request))


async def refused(work: Any) -> tuple[int, dict[str, Any]]:
    """HTTP status and body, as the gateway would answer them."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    return told(caught.value)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings(data_dir=tmp_path_factory.mktemp("data"), max_classifiers=8, database_timeout_seconds=0.5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(chosen: Settings) -> AsyncIterator[Rig]:
    database = await Database.open(chosen)

    def build(engine: Engine, catalog: Catalog, settings: Settings) -> ClassifyCapability:
        return ClassifyCapability(engine, catalog, settings, database)

    async with serving(build, chosen) as up:
        typed = classify_pb2_grpc.ClassifyServiceStub(up.channel)
        rest = classify_rest_pb2_grpc.ClassifyRestServiceStub(up.channel)
        yield Rig(up.engine, up.access, database, typed, rest, up.channel)  # type: ignore[arg-type]
    await database.close()


@pytest.fixture(autouse=True)
def fresh_turnstile(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames:
        request.getfixturevalue("rig").access.reset()


@pytest_asyncio.fixture(loop_scope="module")
async def clean(rig: Rig) -> AsyncIterator[None]:
    """Leave no classifier behind."""
    yield
    for each in await rig.listed():
        await rig.delete(each["classifier_id"])


def _body(fields: Any) -> httpbody_pb2.HttpBody:
    return httpbody_pb2.HttpBody(data=orjson.dumps(fields))


def _json(body: httpbody_pb2.HttpBody) -> Any:
    return orjson.loads(body.data)

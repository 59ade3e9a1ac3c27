"""One server in this process with the batch capability, its parts within reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import orjson
from google.api import httpbody_pb2
from searchfoundation.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    batch_rest_pb2,
    batch_rest_pb2_grpc,
    ops_pb2_grpc,
)

from services.batch.capability import BatchCapability
from services.core.access.key_table import KeyTable
from services.core.catalog import Catalog
from services.core.inference import Engine
from services.core.settings import Settings
from services.core.storage import Database
from tests.rig import MINILM, serving

_SECONDS = 180.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll until the condition holds; fails after a while."""
    deadline = time.monotonic() + _SECONDS
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@dataclass
class Rig:
    """What a test talks to, as one caller."""

    rest: Any
    typed: Any
    database: Database
    ops: Any = None
    metadata: tuple[tuple[str, str], ...] = ()

    async def of_a_key(self, tier: str = "unlimited", balance: int | None = None) -> Rig:
        """The same, as a caller with a key of their own."""
        key, _ = await KeyTable(self.database).create(tier=tier, balance=balance)
        return replace(self, metadata=(("authorization", f"Bearer {key}"),))

    async def create(self, lines: Sequence[Any] | None = None, **fields: Any) -> str:
        given = {"model": MINILM, **({} if lines is None else {"input": lines}), **fields}
        body = httpbody_pb2.HttpBody(data=orjson.dumps(given))
        made = await self.rest.CreateBatch(body, metadata=self.metadata)
        return orjson.loads(made.data)["batch_id"]

    async def status(self, job_id: str) -> dict[str, Any]:
        request = batch_rest_pb2.BatchByPathRequest(batch_id=job_id)
        return orjson.loads((await self.rest.GetBatch(request, metadata=self.metadata)).data)

    async def wait(self, job_id: str, state: str = "completed") -> dict[str, Any]:
        async def reached() -> bool:
            return (await self.status(job_id))["status"] == state

        await until(reached)
        return await self.status(job_id)

    async def cancel(self, job_id: str) -> None:
        await self.typed.CancelBatch(batch_pb2.CancelBatchRequest(id=job_id), metadata=self.metadata)

    async def download(self, job_id: str, file: int = batch_pb2.BATCH_FILE_OUTPUT, offset: int = 0) -> bytes:
        request = batch_pb2.DownloadBatchRequest(id=job_id, file=file, offset=offset)  # type: ignore[arg-type]
        pieces = self.typed.DownloadBatch(request, metadata=self.metadata)
        return b"".join([piece.data async for piece in pieces])


@asynccontextmanager
async def rig(chosen: Settings) -> AsyncIterator[Rig]:
    """Serve the capability."""
    database = await Database.open(chosen)

    def build(engine: Engine, catalog: Catalog, settings: Settings) -> BatchCapability:
        return BatchCapability(engine, catalog, settings, database)

    try:
        async with serving(build, chosen) as up:
            yield Rig(
                batch_rest_pb2_grpc.BatchRestServiceStub(up.channel),
                batch_pb2_grpc.BatchServiceStub(up.channel),
                database,
                ops_pb2_grpc.OpsServiceStub(up.channel),
            )
    finally:
        await database.close()

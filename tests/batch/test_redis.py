"""Redis, where limits of keys are kept, stops or freezes under jobs: no call fails, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from searchfoundation.v1 import batch_pb2

from services.core.access.key_table import KeyTable
from services.core.access.schema import ACCESS
from services.core.storage import Database
from tests.batch import expected
from tests.batch.conftest import Expect
from tests.batch.process import Client, Worker
from tests.rig import settings
from tests.servers import RedisServer, remove, start_redis

Make = Callable[..., Worker]
LINES = 240


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of one's own, to be stopped."""
    server = start_redis(tmp_path)
    yield server
    remove(server)


async def new_key(folder: Path) -> str:
    database = await Database.open(settings(data_dir=folder), ACCESS)
    key, _ = await KeyTable(database).create(tier="tier2", balance=1_000_000)
    await database.close()
    return key


async def spent(folder: Path) -> int:
    database = await Database.open(settings(data_dir=folder), ACCESS)
    keys = KeyTable(database)
    (record,) = await keys.list()
    tokens = await keys.spent(record.id)
    await database.close()
    return tokens


def as_expected(client: Client, job: str, expect: Expect) -> batch_pb2.Batch:
    done = client.wait(job, 180)
    assert (done.succeeded, done.failed, done.total) == (LINES, 0, LINES)
    assert client.download(job) == expect(job, LINES)
    return done


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(1.0, id="short"),
        pytest.param(30.0, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
    ],
)
def test_redis_stops_and_freezes(
    redis: RedisServer, workers: Make, expect: Expect, tmp_path: Path, seconds: float
) -> None:
    data = tmp_path / "data"
    key = asyncio.run(new_key(data))
    worker = workers(SF_AUTH="true", SF_REDIS_URL=redis.url)
    tokens = 0
    with Client(worker, key) as client:
        for away, back in ((redis.freeze, redis.thaw), (redis.kill, redis.start)):
            job = client.submit(input=expected.lines(expected.texts(LINES)))
            client.wait_for_lines(job, 20)
            away()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                client.typed.GetBatch(batch_pb2.GetBatchRequest(id=job), timeout=30)
                time.sleep(0.05)
            made_meanwhile = client.submit(input=expected.lines(expected.texts(LINES)), once=True)
            back()
            for each in (job, made_meanwhile):
                tokens += as_expected(client, each, expect).total_tokens
        assert asyncio.run(spent(data)) == tokens

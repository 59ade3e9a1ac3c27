from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.core.access.key_table import KeyTable
from services.core.access.schema import ACCESS
from services.core.settings import Settings
from services.core.storage import Database
from tests.access.clock import HandClock
from tests.servers import RedisServer, remove, shared_postgres, start_redis


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An empty database of each kind."""
    url = shared_postgres().new_database() if request.param == "postgresql" else None
    return Settings(data_dir=tmp_path / "data", database_url=url)


@pytest.fixture
def sqlite_settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
async def table(settings: Settings) -> AsyncIterator[KeyTable]:
    """The keys of ``settings``, as the command sees them beside a running server."""
    database = await Database.open(settings, ACCESS)
    yield KeyTable(database)
    await database.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may stop."""
    server = start_redis(tmp_path)
    yield server
    remove(server)

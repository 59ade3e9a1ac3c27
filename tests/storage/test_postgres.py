from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import Database
from tests.servers import PostgresServer, remove, start_postgres
from tests.storage.notes import ADD, NOTES, add, count, recovered


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    server = start_postgres()
    yield server
    remove(server)


@pytest.fixture
def settings(server: PostgresServer) -> Settings:
    return Settings(database_url=server.new_database(), database_timeout_seconds=2.0)


async def test_a_restart_is_survived(database: Database, server: PostgresServer) -> None:
    await add(database, "a")
    server.stop()
    for _ in range(3):
        with pytest.raises(ServiceError) as refused:
            await count(database)
        assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    server.start()
    await recovered(database)
    assert await count(database) == 1


async def test_cut_in_the_middle_of_a_transaction(database: Database, server: PostgresServer) -> None:
    with pytest.raises(ServiceError) as refused:
        async with database.write() as connection:
            await connection.execute(ADD, {"id": "a", "body": b""})
            server.stop()
            await connection.execute(ADD, {"id": "b", "body": b""})
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    server.start()
    await recovered(database)
    assert await count(database) == 0


async def test_away_at_start(settings: Settings, server: PostgresServer) -> None:
    server.stop()
    database = await Database.open(settings, NOTES)
    with pytest.raises(ServiceError):
        await database.ping()
    server.start()
    await recovered(database)
    assert await count(database) == 0
    await database.close()


async def test_a_database_that_does_not_exist(server: PostgresServer) -> None:
    database = await Database.open(Settings(database_url=server.url("nowhere")), NOTES)
    with pytest.raises(ServiceError) as refused:
        await database.ping()
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    await database.close()


async def test_a_statement_that_hangs_is_cut(database: Database, server: PostgresServer) -> None:
    with pytest.raises(ServiceError) as refused:
        async with database.read() as connection:
            await connection.execute(text("SELECT pg_sleep(60)"))
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    await recovered(database)

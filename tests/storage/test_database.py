from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import IntegrityError

from services.core.settings import ConfigurationError, Settings
from services.core.storage import Database
from tests.storage.notes import ADD, NOTES, add, count


async def test_what_was_written_is_read_by_a_later_process(database: Database, settings: Settings) -> None:
    await add(database, "a")
    await database.close()
    later = await Database.open(settings, NOTES)
    assert await count(later) == 1
    await later.close()


async def test_a_failed_block_leaves_nothing(database: Database) -> None:
    with pytest.raises(KeyError):
        async with database.write() as connection:
            await connection.execute(ADD, {"id": "a", "body": b""})
            raise KeyError("stop")
    assert await count(database) == 0


async def test_a_broken_constraint_is_not_taken_for_an_absence(database: Database) -> None:
    await add(database, "a")
    with pytest.raises(IntegrityError):
        await add(database, "a")
    assert await count(database) == 1


async def test_many_writers_and_readers_at_once(database: Database) -> None:
    await asyncio.gather(*(add(database, str(n)) for n in range(40)), *(count(database) for _ in range(40)))
    assert await count(database) == 40


async def test_a_reader_is_not_stopped_by_a_writer(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(ADD, {"id": "a", "body": b""})
        assert await count(database) == 0


async def test_ping_and_a_name_without_the_password(database: Database) -> None:
    await database.ping()
    assert "secret-word" not in database.name


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root@host/x", "begins with 'mysql'"),
        ("not a url", "not a URL"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
    ],
)
async def test_an_unusable_url_stops_the_start(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        await Database.open(Settings(database_url=url))

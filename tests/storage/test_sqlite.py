from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import Database
from tests.storage.notes import NOTES, add, count


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_timeout_seconds=0.2)


@pytest.fixture
def file(settings: Settings) -> Path:
    return settings.data_dir / "search-foundation.sqlite3"


async def test_wal_foreign_keys_and_owner_only_file(database: Database, file: Path) -> None:
    async with database.read() as connection:
        mode = (await connection.execute(text("PRAGMA journal_mode"))).scalar_one()
        foreign = (await connection.execute(text("PRAGMA foreign_keys"))).scalar_one()
    assert (mode, foreign) == ("wal", 1)
    assert file.stat().st_mode & 0o077 == 0


async def test_locked_is_503_for_writers_only_and_ends_with_the_lock(database: Database, file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServiceError) as refused:
            await add(database, "a")
        assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert refused.value.retry_after == 1.0
        assert await count(database) == 0
    await add(database, "a")
    assert await count(database) == 1


async def test_a_vanished_file_is_waited_for(
    database: Database, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await add(database, "a")
    await database.close()
    aside = file.rename(file.with_suffix(".aside"))
    with caplog.at_level(logging.INFO, "services"):
        for _ in range(3):
            with pytest.raises(ServiceError) as refused:
                await count(database)
            assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert not file.exists()
        aside.rename(file)
        assert await count(database) == 1
    states = [r.getMessage().split(".sqlite3 ")[1][:7] for r in caplog.records if "database" in r.message]
    assert states == ["is away", "is back"]


async def test_a_replaced_file_is_noticed(database: Database, file: Path, tmp_path: Path) -> None:
    await add(database, "a")
    other = await Database.open(Settings(data_dir=tmp_path / "other"), NOTES)
    await add(other, "b")
    await add(other, "c")
    await other.close()
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink()
    (tmp_path / "other" / file.name).rename(file)
    assert await count(database) == 2


async def test_rubbish_in_place_of_the_file_is_503(settings: Settings, file: Path) -> None:
    settings.data_dir.mkdir()
    file.write_bytes(b"no database at all" * 100)
    database = await Database.open(settings, NOTES)
    with pytest.raises(ServiceError) as refused:
        await count(database)
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    file.unlink()
    assert await count(database) == 0
    await database.close()

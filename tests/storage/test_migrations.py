from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from services.core.settings import Settings
from services.core.storage import Database, Migration, Schema
from tests.storage.notes import NOTES, add, count

STAMPED = Schema(
    "notes", (*NOTES.migrations, Migration(2, "stamp", (text("ALTER TABLE notes ADD COLUMN stamp INTEGER"),)))
)
TAGS = Schema("tags", (Migration(1, "tags", (text("CREATE TABLE tags (id VARCHAR(40) PRIMARY KEY)"),)),))

# Each process waits for the others at the line, then migrates.
RACER = """
import asyncio, sys
from services.core.settings import Settings
from services.core.storage import Database
from tests.storage.test_migrations import STAMPED, TAGS

async def main(url, folder):
    input()
    database = await Database.open(Settings(database_url=url or None, data_dir=folder), STAMPED, TAGS)
    await database.ping()
    await database.close()

print("ready", flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_later_release_keeps_the_rows_and_adds_its_steps(settings: Settings) -> None:
    database = await Database.open(settings, NOTES)
    await add(database, "a")
    await database.close()
    database = await Database.open(settings, STAMPED)
    await database.use(TAGS)
    async with database.read() as connection:
        rows = (await connection.execute(text("SELECT id, stamp FROM notes"))).all()
        applied = await connection.execute(
            text("SELECT component, version, name FROM schema_migrations ORDER BY 1, 2")
        )
        assert applied.all() == [("notes", 1, "notes"), ("notes", 2, "stamp"), ("tags", 1, "tags")]
    assert rows == [("a", None)]
    await database.close()


async def test_a_step_that_fails_leaves_nothing(settings: Settings) -> None:
    broken = Schema("notes", (*NOTES.migrations, Migration(2, "oops", (text("ALTER TABLE nothing DROP x"),))))
    with pytest.raises(DBAPIError):
        await Database.open(settings, broken)
    database = await Database.open(settings, NOTES)
    assert await count(database) == 0
    await database.close()


async def test_an_older_release_runs_on_with_a_warning(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    await (await Database.open(settings, STAMPED)).close()
    with caplog.at_level(logging.WARNING):
        database = await Database.open(settings, NOTES)
    assert "newer migrations of 'notes': [2]" in caplog.text
    await add(database, "a")
    assert await count(database) == 1
    await database.close()


def test_versions_without_a_gap() -> None:
    with pytest.raises(ValueError, match="must be numbered 1, 2, 3"):
        Schema("notes", (Migration(2, "second", ()),))


async def test_processes_that_start_together(settings: Settings) -> None:
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    command = [sys.executable, "-c", RACER, url, str(settings.data_dir)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
    assert [racer.returncode for racer in racers] == [0] * 4
    database = await Database.open(settings, STAMPED)
    assert await count(database) == 0
    await database.close()

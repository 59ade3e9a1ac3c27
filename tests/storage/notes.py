"""A small room with one table, to use a database with."""

from __future__ import annotations

import asyncio

from sqlalchemy import Column, LargeBinary, MetaData, String, Table, text
from sqlalchemy.schema import CreateTable

from services.core.errors import ServiceError
from services.core.storage import Database, Migration, Schema

NOTES = Schema(
    "notes",
    (
        Migration(
            1,
            "notes",
            (
                CreateTable(
                    Table(
                        "notes",
                        MetaData(),
                        Column("id", String(40), primary_key=True),
                        Column("body", LargeBinary, nullable=False),
                    )
                ),
            ),
        ),
    ),
)
ADD = text("INSERT INTO notes (id, body) VALUES (:id, :body)")
COUNT = text("SELECT count(*) FROM notes")


async def add(database: Database, note: str) -> None:
    async with database.write() as connection:
        await connection.execute(ADD, {"id": note, "body": b"\x00\xff"})


async def count(database: Database) -> int:
    async with database.read() as connection:
        return (await connection.execute(COUNT)).scalar_one()


async def recovered(database: Database) -> None:
    """Wait until the database answers; the test's time limit ends a wait in vain."""
    while True:
        try:
            return await database.ping()
        except ServiceError:
            await asyncio.sleep(0.05)

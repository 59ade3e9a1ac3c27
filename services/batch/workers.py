"""Who is alive: signs of life of the workers in the database, and names that no two of them share."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import ColumnElement, column, delete, literal_column, select, table, text
from sqlalchemy.ext.asyncio import AsyncConnection

from services.core.folders import private_folder
from services.core.settings import Settings
from services.core.storage import Database

_WORKERS = table("batch_workers", column("id"), column("seen"))
# The database's clock, so that several machines agree on who is late.
_CLOCKS: Mapping[str, ColumnElement[float]] = {
    "sqlite": literal_column("(julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"),
}
_BEAT = (
    "INSERT INTO batch_workers (id, seen) VALUES (:id, {clock})"
    " ON CONFLICT (id) DO UPDATE SET seen = excluded.seen"
)


class WorkerName:
    """The name of this worker, held until the process ends.

    A process that is started again finds the name it had, since the lock on it died with it; several
    processes of one host get several names.
    """

    def __init__(self, settings: Settings) -> None:
        base = settings.worker_id or socket.gethostname()
        folder = settings.data_dir / "workers"
        private_folder(folder)
        number = 0
        while (lock := _try_lock(folder / f"{base}-{number}.lock")) is None:
            number += 1
        self._lock = lock
        self.id = f"{base}-{number}"

    def release(self) -> None:
        """Let another process have the name."""
        os.close(self._lock)


def _try_lock(path: Path) -> int | None:
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


class Heartbeats:
    """Signs of life; every method raises SERVICE_UNAVAILABLE while the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def beat(self, worker: str) -> None:
        """Say that a worker is alive."""
        async with self._database.write() as connection:
            statement = text(_BEAT.format(clock=_clock(connection)))
            await connection.execute(statement, {"id": worker})

    async def late(self, seconds: float) -> list[str]:
        """Name the workers that were not heard of for so long."""
        async with self._database.read() as connection:
            query = select(_WORKERS.c.id).where(_WORKERS.c.seen < _clock(connection) - seconds)
            return list((await connection.execute(query)).scalars())

    async def bury(self, worker: str, seconds: float) -> None:
        """Forget a worker, unless it was heard of after all."""
        async with self._database.write() as connection:
            late = _WORKERS.c.seen < _clock(connection) - seconds
            await connection.execute(delete(_WORKERS).where(_WORKERS.c.id == worker, late))

    async def leave(self, worker: str) -> None:
        """Say that a worker ends now: others need not wait until it is late."""
        async with self._database.write() as connection:
            await connection.execute(text("UPDATE batch_workers SET seen = 0 WHERE id = :id"), {"id": worker})


def _clock(connection: AsyncConnection) -> ColumnElement[float]:
    return _CLOCKS[connection.dialect.name]

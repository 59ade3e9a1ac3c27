"""What SQLite needs beyond what SQLAlchemy does: WAL, real transactions, an owner-only file."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError

from services.core.folders import private_folder

# At DEBUG the driver logs every statement with its parameters, and those hold key digests.
logging.getLogger("aiosqlite").setLevel(logging.INFO)

WRITE = "sf_write"
"""Execution option of a connection whose transaction takes the write lock at its start."""


def prepare(path: Path, timeout: float, *, create: bool) -> None:
    """Make the file (mode 0600) and put it in WAL mode, which it keeps. Blocking.

    Two processes doing so at once can get "database is locked" from SQLite whatever its busy timeout,
    hence the lock file. Raises ``FileNotFoundError`` when the file is missing and not to be created,
    ``OSError`` or ``sqlite3.Error`` when it cannot be used.
    """
    if create:
        private_folder(path.parent)
    elif not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(path, timeout=timeout)) as connection:
            connection.execute("PRAGMA journal_mode=WAL").fetchall()
    finally:
        os.close(lock)


def is_busy(error: BaseException) -> bool:
    """Whether another connection holds the lock, rather than the database being out of order."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_mistake(error: BaseException) -> bool:
    """Whether SQLite refused the statement itself, which Python reports as an ``OperationalError``."""
    return _code(error) == sqlite3.SQLITE_ERROR


def _code(error: BaseException) -> int:
    """Give SQLite's primary result code; 0 when the error is not SQLite's."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF


def install(engine: Engine) -> None:
    """Hook the engine's connections: pragmas, and transactions begun by us.

    The sqlite3 module would otherwise begin one only before the first change, leaving reads and DDL
    outside. Writers begin IMMEDIATE: a read transaction that turns into a write one can fail at once
    as "locked" without waiting for the busy timeout.
    """

    def connect(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        # FULL: what a caller was told is done must outlive a power cut, which NORMAL in WAL does not.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get(WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)

"""One database for the process: connections, transactions, migrations, and what to do when it is away."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, Self

from sqlalchemy import exc, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import sqlite
from services.core.storage.address import database_url, sqlite_path
from services.core.storage.migrations import Schema, apply

logger = logging.getLogger(__name__)

_RETRY_AFTER = 1.0
_REST_SECONDS = 0.5
_MIGRATION_LOCK = 0x5EA7C4F0

# Our own mistakes (bad SQL, a broken constraint), not the database's absence.
_MISTAKES = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)
_ABSENCE = (exc.DBAPIError, exc.TimeoutError, ConnectionError, TimeoutError)


class Database:
    """SQLite or PostgreSQL behind two context managers, ``read`` and ``write``.

    While the database is gone or locked both raise ``ServiceError`` SERVICE_UNAVAILABLE with
    ``retry_after``; nothing has to be called when it is back. Connections that failed are
    replaced and migrations checked again, so a database restored empty is made anew.
    """

    def __init__(self, url: URL, *, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._schemas: list[Schema] = []
        self._engine = self._create_engine()
        self._migrated = False
        self._migrating = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._inode: int | None = None
        self._rest_until = 0.0
        self._away = False

    @classmethod
    async def open(cls, settings: Settings, *schemas: Schema) -> Self:
        """Connect and migrate.

        A database that cannot be reached now is logged and tried again at the next use. Raises
        ``ConfigurationError`` with one sentence for an unusable ``SF_DATABASE_URL``.
        """
        database = cls(database_url(settings), timeout=settings.database_timeout_seconds)
        try:
            await database.use(*schemas)
        except BaseException:
            await database.close()
            raise
        return database

    async def use(self, *schemas: Schema) -> None:
        """Add the tables of a room; see ``open`` for a database that is away."""
        self._schemas.extend(schema for schema in schemas if schema not in self._schemas)
        self._migrated = False
        try:
            await self._migrate()
        except ServiceError:
            logger.warning("the database is tried again at its next use")

    @property
    def name(self) -> str:
        """The address without its password, for logs and readiness."""
        return self._url.render_as_string(hide_password=True)

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncConnection]:
        """Give a connection inside a transaction that sees one state of the database.

        Keep other I/O out of the block: its time-outs would be taken for the database's.
        """
        async with self._transaction(write=False) as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncConnection]:
        """Give a connection inside a transaction, committed on leaving and rolled back on an exception.

        On SQLite it holds the only write lock: keep it short, and keep other I/O out as in ``read``.
        """
        async with self._transaction(write=True) as connection:
            yield connection

    async def ping(self) -> None:
        """Ask the database for a sign of life; raises as ``read`` does."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    def _create_engine(self) -> AsyncEngine:
        arguments: dict[str, Any] = {"timeout": self._timeout}
        options: dict[str, Any] = {}
        if self._is_sqlite:
            options["pool_size"] = 4
        else:
            arguments["command_timeout"] = self._timeout
            options["pool_pre_ping"] = True
        engine = create_async_engine(
            self._url,
            connect_args=arguments,
            pool_timeout=self._timeout,
            # Parameters hold key hashes; they have no place in a log.
            hide_parameters=True,
            **options,
        )
        if self._is_sqlite:
            sqlite.install(engine.sync_engine)
        return engine

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @asynccontextmanager
    async def _transaction(self, *, write: bool) -> AsyncGenerator[AsyncConnection]:
        if time.monotonic() < self._rest_until:
            raise _unavailable()
        if not self._migrated or self._was_moved():
            await self._migrate()
        try:
            async with self._turn(write=write), self._connect(write=write) as connection:
                yield connection
        except _MISTAKES:
            raise
        except _ABSENCE as error:
            self._raise_unavailable(error)

    @asynccontextmanager
    async def _turn(self, *, write: bool) -> AsyncGenerator[None]:
        """Let this process's SQLite writers go in turn: SQLite's own waiting is a lottery."""
        if not (write and self._is_sqlite):
            yield
            return
        async with asyncio.timeout(self._timeout):
            await self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()

    @asynccontextmanager
    async def _connect(self, *, write: bool) -> AsyncGenerator[AsyncConnection]:
        try:
            connection = await self._engine.connect()
        except OSError as error:
            # Calls that come while nobody answers are told so at once instead of queueing to connect.
            self._rest_until = time.monotonic() + _REST_SECONDS
            raise ConnectionError(f"cannot connect: {error}") from error
        async with aclosing(connection):
            await connection.execution_options(**{sqlite.WRITE: write})
            async with connection.begin():
                yield connection

    async def _migrate(self) -> None:
        async with self._migrating:
            if self._migrated and not self._was_moved():
                return
            try:
                # Connections that outlived a failure may lead to a server or file that is no more.
                await self._engine.dispose()
                if self._is_sqlite:
                    await asyncio.to_thread(self._prepare_file)
                async with self._connect(write=True) as connection:
                    if not self._is_sqlite:
                        await connection.execute(
                            text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK}
                        )
                    await connection.run_sync(apply, tuple(self._schemas))
            except _MISTAKES:
                raise
            except (*_ABSENCE, OSError, sqlite3.Error) as error:
                self._raise_unavailable(error)
            self._migrated = True
            if self._away:
                self._away = False
                logger.info("database %s is back", self.name)

    def _prepare_file(self) -> None:
        path = sqlite_path(self._url)
        # A file that vanished under a running process is waited for: an empty one in its place would
        # turn every key into an unknown one.
        sqlite.prepare(path, self._timeout, create=self._inode is None)
        self._inode = path.stat().st_ino

    def _was_moved(self) -> bool:
        """Whether the SQLite file was removed or replaced; open connections would not notice."""
        if self._inode is None:
            return False
        try:
            return sqlite_path(self._url).stat().st_ino != self._inode
        except OSError:
            return True

    def _raise_unavailable(self, error: Exception) -> NoReturn:
        """Log the first failure; unless it was a mere wait, connect and check the tables anew."""
        if sqlite.is_mistake(error):
            raise error
        if sqlite.is_busy(error) or isinstance(error, exc.TimeoutError | TimeoutError):
            logger.warning("database %s is locked or too slow: %s", self.name, str(error) or "timed out")
            raise _unavailable() from error
        self._migrated = False
        if not self._away:
            self._away = True
            logger.error("database %s is away: %s", self.name, error)
        raise _unavailable() from error


def _unavailable() -> ServiceError:
    return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_AFTER)

"""Forward-only migrations, one numbered line per room.

Alembic is not used: it orders one history of script files found on disk, whereas here each room
brings its own history as data, several processes may start at once, and nothing is ever
downgraded. What is left to do is below.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, Executable, column, insert, select, table, text

logger = logging.getLogger(__name__)

_APPLIED = table(
    "schema_migrations", column("component"), column("version"), column("name"), column("applied_at")
)

_CREATE_APPLIED = text(
    "CREATE TABLE IF NOT EXISTS schema_migrations ("
    " component VARCHAR(64) NOT NULL, version INTEGER NOT NULL, name VARCHAR(200) NOT NULL,"
    " applied_at DOUBLE PRECISION NOT NULL, PRIMARY KEY (component, version))"
)


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of a room's schema, run in one transaction with all others that are due.

    ``steps`` are SQLAlchemy statements valid on SQLite and PostgreSQL: ``CreateTable`` of a table written
    out here (never the live table, which changes later), ``CreateIndex``, ``text``. A published
    migration is never edited: add another.
    """

    version: int
    name: str
    steps: tuple[Executable, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """The history of one room's tables; versions count 1, 2, 3, ... without a gap."""

    component: str
    migrations: tuple[Migration, ...]

    def __post_init__(self) -> None:
        versions = [m.version for m in self.migrations]
        if versions != list(range(1, len(versions) + 1)):
            raise ValueError(
                f"migrations of '{self.component}' must be numbered 1, 2, 3, ...; got {versions}"
            )


def apply(connection: Connection, schemas: Iterable[Schema]) -> None:
    """Bring every schema to its newest version, in the order given.

    The caller holds the database's write lock and one transaction, so that of several processes
    starting together one migrates and the others find it done, and a failing step leaves nothing.
    """
    connection.execute(_CREATE_APPLIED)
    for schema in schemas:
        done = set(
            connection.scalars(select(_APPLIED.c.version).where(_APPLIED.c.component == schema.component))
        )
        if unknown := done - {m.version for m in schema.migrations}:
            # A newer release ran here and this one was rolled back to: its tables may still fit.
            logger.warning("database has newer migrations of '%s': %s", schema.component, sorted(unknown))
        due = [migration for migration in schema.migrations if migration.version not in done]
        for migration in due:
            _apply_one(connection, schema.component, migration)
        if due:
            names = ", ".join(migration.name for migration in due)
            logger.info("migrated '%s' to version %d (%s)", schema.component, due[-1].version, names)


def _apply_one(connection: Connection, component: str, migration: Migration) -> None:
    for step in migration.steps:
        connection.execute(step)
    connection.execute(
        insert(_APPLIED).values(
            component=component, version=migration.version, name=migration.name, applied_at=time.time()
        )
    )

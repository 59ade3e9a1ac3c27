"""The first API key of an installation."""

from __future__ import annotations

import time

from services.core.settings import Settings


async def first_key(settings: Settings) -> str | None:
    """Make a key when keys are asked for, live in the database, and none of them opens anything.

    Raises ServiceError when the database cannot be used.
    """
    # Imported here: SQLAlchemy takes half a second, and not every start needs it.
    from services.core.access.control import uses_database
    from services.core.access.key_table import KeyTable
    from services.core.access.schema import ACCESS
    from services.core.storage import Database

    if not settings.auth or not uses_database(settings):
        return None
    database = await Database.open(settings, ACCESS)
    try:
        table = KeyTable(database)
        now = time.time()
        if any(record.usable(now) for record in await table.list()):
            return None
        key, _ = await table.create(tier=settings.default_tier, name="first")
        return key
    finally:
        await database.close()

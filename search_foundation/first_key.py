"""The first API key of an installation, and the file that keeps it for its owner."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from services.core.settings import Settings

FILE = "first-key"
"""In ``SF_DATA_DIR``."""


@dataclass(frozen=True, slots=True)
class FirstKey:
    """A key that opens this installation and the file it is kept in; ``key`` only if it was made just now."""

    path: Path
    key: str | None = None


async def first_key(settings: Settings) -> FirstKey | None:
    """Make a key when keys are asked for, live in the database, and none of them opens anything.

    It is kept in a file that only its owner may read. None if there are keys and that file has none of them.
    Raises ServiceError when the database cannot be used, and OSError when the file cannot be written.
    """
    # Imported here: SQLAlchemy takes half a second, and not every start needs it.
    from services.core.access.control import uses_database
    from services.core.access.key_table import KeyTable
    from services.core.access.keys import digest
    from services.core.access.schema import ACCESS
    from services.core.storage import Database

    if not settings.auth or not uses_database(settings):
        return None
    path = (settings.data_dir / FILE).resolve()
    database = await Database.open(settings, ACCESS)
    try:
        table = KeyTable(database)
        now = time.time()
        usable = {record.digest for record in await table.list() if record.usable(now)}
        if not usable:
            # Opened first: a key that cannot be written down would be lost.
            with _private(path) as file:
                key, _ = await table.create(tier=settings.default_tier, name="first")
                file.write(f"{key}\n")
            return FirstKey(path, key)
        kept = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return FirstKey(path) if digest(kept).hex() in usable else None
    finally:
        await database.close()


def _private(path: Path) -> TextIO:
    """Open a file for writing that nobody else may read, also if it was there already."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8")

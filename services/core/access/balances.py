"""What is left to keys with a balance, for work that was admitted long before it is done."""

from __future__ import annotations

from services.core.access.control import key_file
from services.core.access.key_table import KeyTable
from services.core.settings import Settings
from services.core.storage import Database


class Balances:
    """Balances as the database and SF_KEYS_FILE have them; every method raises SERVICE_UNAVAILABLE."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._file = key_file(settings) if settings.auth else None
        self._table = KeyTable(database)

    async def left(self, key_id: str) -> int | None:
        """Give the tokens left, below zero for a key that is overdrawn; None for one without a balance."""
        granted = self._file.granted(key_id) if self._file is not None else None
        if granted is None:
            granted = await self._table.granted(key_id)
        return None if granted is None else granted - await self._table.spent(key_id)

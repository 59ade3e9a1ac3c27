"""Keys in the database."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from sqlalchemy import column, func, insert, select, table, update

from services.core.access.booking import book
from services.core.access.keys import KeyRecord, digest, new_key
from services.core.storage import Database

_KEYS = table(
    "api_keys",
    *map(column, ("id", "digest", "name", "tier", "created_at", "balance", "expires_at", "revoked_at")),
)
_SPENDING = table("key_spending", column("key_id"), column("tokens"))
_RECORDS = select(*_KEYS.c, func.coalesce(_SPENDING.c.tokens, 0).label("spent")).select_from(
    _KEYS.outerjoin(_SPENDING, _SPENDING.c.key_id == _KEYS.c.id)
)


class KeyTable:
    """Keys as rows; every method raises SERVICE_UNAVAILABLE while the database is away."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def create(
        self, *, tier: str, name: str = "", balance: int | None = None, expires_at: float | None = None
    ) -> tuple[str, KeyRecord]:
        """Make a key and store its digest. The key itself is in the answer and nowhere else."""
        key = new_key()
        record = KeyRecord(
            id=f"key_{secrets.token_hex(8)}",
            digest=digest(key).hex(),
            name=name,
            tier=tier,
            created_at=time.time(),
            balance=balance,
            expires_at=expires_at,
        )
        row = {c.name: getattr(record, c.name) for c in _KEYS.c}
        async with self.database.write() as connection:
            await connection.execute(insert(_KEYS).values(row))
        return key, record

    async def list(self) -> list[KeyRecord]:
        """Give every key, oldest first, the revoked ones too."""
        async with self.database.read() as connection:
            rows = await connection.execute(_RECORDS.order_by(_KEYS.c.created_at, _KEYS.c.id))
            return [KeyRecord(**row) for row in rows.mappings()]

    async def find(self, key_digest: bytes) -> KeyRecord | None:
        """Look a key up by its digest."""
        async with self.database.read() as connection:
            rows = await connection.execute(_RECORDS.where(_KEYS.c.digest == key_digest.hex()))
            row = rows.mappings().one_or_none()
        return None if row is None else KeyRecord(**row)

    async def revoke(self, key_id: str) -> bool:
        """Close a key for good; false when there is no such open key."""
        change = update(_KEYS).where(_KEYS.c.id == key_id, _KEYS.c.revoked_at.is_(None))
        async with self.database.write() as connection:
            return (await connection.execute(change.values(revoked_at=time.time()))).rowcount == 1

    async def top_up(self, key_id: str, tokens: int) -> bool:
        """Grant a metered key more tokens; false when there is no such key or it has no balance."""
        change = update(_KEYS).where(_KEYS.c.id == key_id, _KEYS.c.balance.is_not(None))
        async with self.database.write() as connection:
            return (await connection.execute(change.values(balance=_KEYS.c.balance + tokens))).rowcount == 1

    async def granted(self, key_id: str) -> int | None:
        """Give the tokens granted to a key in all; None for one without a balance, or that is not here."""
        query = select(_KEYS.c.balance).where(_KEYS.c.id == key_id)
        async with self.database.read() as connection:
            return (await connection.execute(query)).scalar_one_or_none()

    async def spent(self, key_id: str) -> int:
        """Give the tokens a metered key has used."""
        query = select(_SPENDING.c.tokens).where(_SPENDING.c.key_id == key_id)
        async with self.database.read() as connection:
            return (await connection.execute(query)).scalar_one_or_none() or 0

    async def spend(self, tokens: Mapping[str, int]) -> dict[str, int]:
        """Add what was used, by key id, in one transaction; gives the new sums of all processes."""
        async with self.database.write() as connection:
            # In one order, so that two processes never wait for each other's rows.
            return {key_id: await book(connection, key_id, n) for key_id, n in sorted(tokens.items())}

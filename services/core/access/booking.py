"""Taking tokens from the balances of keys, in a transaction of the caller's."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_BOOK = text(
    "INSERT INTO key_spending (key_id, tokens) VALUES (:key_id, :tokens)"
    " ON CONFLICT (key_id) DO UPDATE SET tokens = key_spending.tokens + excluded.tokens RETURNING tokens"
)


async def book(connection: AsyncConnection, key_id: str, tokens: int) -> int:
    """Take tokens from a key's balance, below zero if need be; gives all it has spent since it was made.

    It happens if and only if the transaction of ``connection`` is committed, and the limits of a minute do
    not count: for work that was admitted long before it is done. Processes notice within
    ``SF_KEY_CACHE_SECONDS``. The tables of this room must be in use.
    """
    return (await connection.execute(_BOOK, {"key_id": key_id, "tokens": tokens})).scalar_one()

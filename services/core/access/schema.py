"""Tables of this room."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, MetaData, String, Table
from sqlalchemy.schema import CreateTable

from services.core.storage import Migration, Schema

_V1 = MetaData()
_KEYS = Table(
    "api_keys",
    _V1,
    Column("id", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("tier", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("balance", BigInteger),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)
# Not a column of api_keys: keys of SF_KEYS_FILE spend too, and have no row there.
_SPENDING = Table(
    "key_spending",
    _V1,
    Column("key_id", String(64), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)

ACCESS = Schema("access", (Migration(1, "keys", (CreateTable(_KEYS), CreateTable(_SPENDING))),))

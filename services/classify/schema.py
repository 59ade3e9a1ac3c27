"""Table of this room."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.schema import CreateIndex, CreateTable

from services.core.storage import Migration, Schema

_V1 = MetaData()
_CLASSIFIERS = Table(
    "classifiers",
    _V1,
    Column("id", String(36), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("model", String(200), nullable=False),
    Column("access", String(16), nullable=False),
    Column("labels", Text, nullable=False),  # a JSON list, in the order of the weights' rows
    # (1 + labels, width) little-endian float32, row by row: the centre, then a row for each label
    Column("weights", LargeBinary, nullable=False),
    Column("width", Integer, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("used_number", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("used_at", Double),
    # Who is training it further, and until when that is believed without a sign of life.
    Column("lease_holder", String(36)),
    Column("lease_until", Double),
)
_OWNER = Index("classifiers_by_owner", _CLASSIFIERS.c.owner, _CLASSIFIERS.c.created_at)

CLASSIFIERS = Schema(
    "classify", (Migration(1, "classifiers", (CreateTable(_CLASSIFIERS), CreateIndex(_OWNER))),)
)

"""The classifiers of all keys, in the database."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    case,
    column,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable

from services.classify.learner import LabelWeights
from services.classify.schema import Access, Classifier
from services.core.storage import Database, Migration, Schema

_V1 = MetaData()
_FIRST = Table(
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
_OWNER = Index("classifiers_by_owner", _FIRST.c.owner, _FIRST.c.created_at)

CLASSIFIERS = Schema("classify", (Migration(1, "classifiers", (CreateTable(_FIRST), CreateIndex(_OWNER))),))


Matrix = NDArray[np.float32]

_FACTS = (
    *("id", "owner", "model", "access", "labels", "version"),
    *("used_number", "created_at", "updated_at", "used_at"),
)
_STORED = ("weights", "width", "lease_holder", "lease_until")
_CLASSIFIERS = table("classifiers", *map(column, (*_FACTS, *_STORED)))
_C = _CLASSIFIERS.c

# The database's clock, so that several machines agree on when a lease has run out.
_CLOCKS: Mapping[str, ColumnElement[float]] = {
    "sqlite": literal_column("(julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"),
}


class Taken(Enum):
    """What came of asking for a lease."""

    YES = "yes"
    BUSY = "busy"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides whether a call may use a classifier, and in which version."""

    owner: str
    access: Access
    version: int

    def open_to(self, caller: str) -> bool:
        """Whether ``caller`` may classify with it."""
        return self.access is Access.PUBLIC or self.owner == caller


@dataclass(frozen=True, slots=True)
class Trained:
    """One version of a classifier; the rows of ``head``'s weights are in the order of ``labels``."""

    model: str
    labels: tuple[str, ...]
    version: int
    head: LabelWeights


class ClassifierTable:
    """Classifiers as rows; every method raises SERVICE_UNAVAILABLE while the database is away.

    Each change is one transaction, committed when the method returns.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def count(self, key_id: str) -> int:
        """Give the number of an owner's classifiers."""
        async with self._database.read() as connection:
            return await _count(connection, key_id)

    async def create(self, classifier: Classifier, matrix: Matrix, limit: int) -> bool:
        """Store a new classifier; false, storing none, when its owner already has ``limit``."""
        row = {
            "id": classifier.id,
            "owner": classifier.owner,
            "model": classifier.model,
            "access": classifier.access.value,
            "version": classifier.version,
            "used_number": classifier.used_number,
            "created_at": classifier.created_at,
            "updated_at": classifier.updated_at,
            **_packed(classifier.labels, matrix),
        }
        async with self._database.write() as connection:
            await _let_owner_in_alone(connection, classifier.owner)
            if await _count(connection, classifier.owner) >= limit:
                return False
            await connection.execute(insert(_CLASSIFIERS).values(row))
        return True

    async def list(self, key_id: str) -> list[Classifier]:
        """Give an owner's classifiers, oldest first."""
        query = select(*(_C[name] for name in _FACTS)).where(_C.owner == key_id)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(_C.created_at, _C.id))
            return [_classifier(row) for row in rows.mappings()]

    async def find(self, classifier_id: str) -> Classifier | None:
        """Describe a classifier."""
        query = select(*(_C[name] for name in _FACTS)).where(_C.id == classifier_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else _classifier(row)

    async def standing(self, classifier_id: str) -> Standing | None:
        """Look up what a call must know before it may use a classifier."""
        query = select(_C.owner, _C.access, _C.version).where(_C.id == classifier_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Standing(row.owner, Access(row.access), row.version)

    async def trained(self, classifier_id: str) -> Trained | None:
        """Read the last version of a classifier."""
        query = select(_C.model, _C.labels, _C.version, _C.weights, _C.width).where(_C.id == classifier_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        labels = _labels(row.labels)
        matrix = np.frombuffer(row.weights, "<f4").reshape(1 + len(labels), row.width)
        return Trained(row.model, labels, row.version, LabelWeights.from_matrix(matrix))

    async def delete(self, classifier_id: str, key_id: str) -> bool:
        """Delete a classifier; false when the owner has none of that id."""
        change = delete(_CLASSIFIERS).where(_C.id == classifier_id, _C.owner == key_id)
        async with self._database.write() as connection:
            return (await connection.execute(change)).rowcount == 1

    async def take(self, classifier_id: str, key_id: str, holder: str, seconds: float) -> Taken:
        """Take the lease on a classifier for ``seconds``, unless another holder has it."""
        mine = select(_C.id).where(_C.id == classifier_id, _C.owner == key_id)
        async with self._database.write() as connection:
            now = _CLOCKS[connection.dialect.name]
            free = or_(_C.lease_holder.is_(None), _C.lease_until <= now)
            change = update(_CLASSIFIERS).where(_C.id == classifier_id, _C.owner == key_id, free)
            taken = await connection.execute(change.values(lease_holder=holder, lease_until=now + seconds))
            if taken.rowcount == 1:
                return Taken.YES
            found = (await connection.execute(mine)).one_or_none()
        return Taken.MISSING if found is None else Taken.BUSY

    async def renew(self, classifier_id: str, holder: str, seconds: float) -> bool:
        """Hold a lease for another ``seconds``; false when it was lost."""
        change = update(_CLASSIFIERS).where(_C.id == classifier_id, _C.lease_holder == holder)
        async with self._database.write() as connection:
            until = _CLOCKS[connection.dialect.name] + seconds
            return (await connection.execute(change.values(lease_until=until))).rowcount == 1

    async def release(self, classifier_id: str, holder: str) -> None:
        """Give a lease back, if it is still there."""
        change = update(_CLASSIFIERS).where(_C.id == classifier_id, _C.lease_holder == holder)
        async with self._database.write() as connection:
            await connection.execute(change.values(lease_holder=None, lease_until=None))

    async def replace(
        self, classifier_id: str, holder: str, version: int, labels: tuple[str, ...], matrix: Matrix
    ) -> bool:
        """Store the version after ``version`` and give the lease back.

        False, storing nothing, when the classifier is gone, the lease was lost or the version is another.
        """
        change = update(_CLASSIFIERS).where(
            _C.id == classifier_id, _C.lease_holder == holder, _C.version == version
        )
        values: dict[str, Any] = {
            "version": version + 1,
            "updated_at": time.time(),
            "lease_holder": None,
            "lease_until": None,
            **_packed(labels, matrix),
        }
        async with self._database.write() as connection:
            return (await connection.execute(change.values(values))).rowcount == 1

    async def add_uses(self, uses: Mapping[str, tuple[int, float]]) -> None:
        """Add calls, by classifier id, as their number and the time of the last one."""
        async with self._database.write() as connection:
            # In one order everywhere: two processes cannot wait for each other's rows.
            for classifier_id, (number, last) in sorted(uses.items()):
                later = case((_C.used_at > last, _C.used_at), else_=last)
                change = update(_CLASSIFIERS).where(_C.id == classifier_id)
                await connection.execute(change.values(used_number=_C.used_number + number, used_at=later))


def new_holder() -> str:
    """Name a holder of a lease."""
    return str(uuid.uuid4())


async def _count(connection: AsyncConnection, key_id: str) -> int:
    query = select(func.count()).select_from(_CLASSIFIERS).where(_C.owner == key_id)
    return (await connection.execute(query)).scalar_one()


async def _let_owner_in_alone(connection: AsyncConnection, key_id: str) -> None:
    """Make other creations of one owner wait for this transaction, or two could both be the last allowed.

    On SQLite there is only one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(hashtext(:room), hashtext(:owner))")
        await connection.execute(lock, {"room": "classifiers", "owner": key_id})


def _packed(labels: tuple[str, ...], matrix: Matrix) -> dict[str, Any]:
    return {
        # JSON escapes NUL, which PostgreSQL's text cannot hold.
        "labels": orjson.dumps(labels).decode(),
        "weights": matrix.astype("<f4", copy=False).tobytes(),
        "width": matrix.shape[1],
    }


def _labels(stored: str) -> tuple[str, ...]:
    return tuple(orjson.loads(stored))


def _classifier(row: RowMapping) -> Classifier:
    facts: dict[str, Any] = dict(row)
    facts.update(access=Access(row["access"]), labels=_labels(row["labels"]))
    return Classifier(**facts)

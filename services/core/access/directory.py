"""From a key to its principal, remembering what was looked up for a few seconds."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from services.core.access.key_file import KeyFile
from services.core.access.key_table import KeyTable
from services.core.access.keys import KeyRecord
from services.core.access.ledger import Ledger
from services.core.access.principal import Clock, KeyLimits, Principal
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Tier

logger = logging.getLogger(__name__)

_MAX_ENTRIES = 16_384
_MAX_LOOKUPS = 8


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a look-up found; ``None`` stands for a key that opens nothing."""

    principal: Principal | None
    fresh_until: float
    valid_until: float


class KeyDirectory:
    """Looks keys up in the file, then in the database.

    An answer is used for ``max_age`` seconds at most, so a revocation takes effect within that time. From
    half of it on, the next call has it looked up again in the background, so that a key in steady use
    never waits for the database. Keys nobody knows are remembered too, in a cache of their own: a
    flood of wrong keys neither drives out the right ones nor sends more than a few queries at a time.
    """

    def __init__(
        self,
        *,
        file: KeyFile | None,
        table: KeyTable | None,
        ledger: Ledger | None,
        tiers: Mapping[str, Tier],
        max_age: float,
        clock: Clock,
    ) -> None:
        self._file = file
        self._table = table
        self._ledger = ledger
        self._tiers = tiers
        self._max_age = max_age
        self._clock = clock
        self._known: dict[bytes, _Entry] = {}
        self._unknown: dict[bytes, _Entry] = {}
        self._lookups: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._turns = asyncio.Semaphore(_MAX_LOOKUPS)

    async def find(self, key_digest: bytes) -> Principal | None:
        """Give the principal of a key, ``None`` for one that opens nothing.

        Raises SERVICE_UNAVAILABLE when nothing fresh enough is known and the database is away.
        """
        entry = self._known.get(key_digest) or self._unknown.get(key_digest)
        if entry is not None:
            now = self._clock.monotonic()
            if now < entry.fresh_until:
                return self._unexpired(entry.principal)
            if now < entry.valid_until:
                self._look_up(key_digest)
                return self._unexpired(entry.principal)
        # Shielded: the look-up may serve other calls than the one that is cancelled.
        return await asyncio.shield(self._look_up(key_digest))

    async def close(self) -> None:
        """End look-ups still under way."""
        lookups = tuple(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    def _unexpired(self, principal: Principal | None) -> Principal | None:
        if principal is None or principal.expires_at is None or self._clock.wall() < principal.expires_at:
            return principal
        return None

    def _look_up(self, key_digest: bytes) -> asyncio.Task[Principal | None]:
        task = self._lookups.get(key_digest)
        if task is None:
            task = asyncio.create_task(self._load(key_digest))
            self._lookups[key_digest] = task
            task.add_done_callback(lambda done: self._looked_up(key_digest, done))
        return task

    def _looked_up(self, key_digest: bytes, task: asyncio.Task[Principal | None]) -> None:
        del self._lookups[key_digest]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ServiceError):
            logger.error("looking a key up failed", exc_info=error)

    async def _load(self, key_digest: bytes) -> Principal | None:
        async with self._turns:
            asked = self._clock.monotonic()
            record = await self._read(key_digest)
        principal = None
        if record is not None and record.usable(self._clock.wall()):
            principal = self._principal(record)
        entry = _Entry(principal, asked + self._max_age / 2, asked + self._max_age)
        self._known.pop(key_digest, None)
        self._unknown.pop(key_digest, None)
        _put(self._unknown if principal is None else self._known, key_digest, entry)
        return principal

    async def _read(self, key_digest: bytes) -> KeyRecord | None:
        record = self._file.find(key_digest) if self._file else None
        version = self._ledger.version if self._ledger else 0
        spent = 0
        if self._table is not None:
            if record is None:
                record = await self._table.find(key_digest)
                spent = record.spent if record else 0
            elif record.balance is not None:
                spent = await self._table.spent(record.id)
        if record is None or not hmac.compare_digest(bytes.fromhex(record.digest), key_digest):
            return None
        if self._ledger is not None and record.balance is not None:
            self._ledger.learn(record.id, granted=record.balance, spent=spent, version=version)
        return record

    def _principal(self, record: KeyRecord) -> Principal:
        tier = self._tiers.get(record.tier)
        if tier is None:
            # Neither letting the key in without limits nor calling it wrong would be true.
            logger.error("key %s has tier '%s', which no setting describes", record.id, record.tier)
            raise ServiceError(ErrorCode.INTERNAL_ERROR)
        return Principal(
            key_id=record.id,
            tier=record.tier,
            limits=KeyLimits.of(tier),
            name=record.name,
            expires_at=record.expires_at,
            metered=record.balance is not None,
        )


def _put(cache: dict[bytes, _Entry], key_digest: bytes, entry: _Entry) -> None:
    """Add an entry at the end; the longest unrefreshed one makes room."""
    if len(cache) >= _MAX_ENTRIES:
        del cache[next(iter(cache))]
    cache[key_digest] = entry

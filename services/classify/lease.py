"""The right to train a classifier further, held by one call at a time of all processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from services.classify.metrics import BUSY
from services.classify.schema import busy, not_found
from services.classify.table import ClassifierTable, Taken, new_holder
from services.core.errors import ServiceError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 6.0
"""After a crash, a classifier can be trained again no later than this."""
WAIT_SECONDS = 2.0
_RENEW_SECONDS = LEASE_SECONDS / 3
_POLL_SECONDS = 0.05


class Leases:
    """Leases in the database, which outlive neither their holder's process nor its connection for long."""

    def __init__(self, table: ClassifierTable) -> None:
        self._table = table

    @asynccontextmanager
    async def hold(self, classifier_id: str, key_id: str) -> AsyncGenerator[str]:
        """Give the name of the holder, who may replace the classifier until the block ends.

        Raises ``ServiceError``: RESOURCE_NOT_FOUND when ``key_id`` has no such classifier,
        CONFLICT_RESOURCE_BUSY when another call keeps it longer than ``WAIT_SECONDS``.
        """
        holder = new_holder()
        try:
            await self._take(classifier_id, key_id, holder)
        except asyncio.CancelledError:
            # It may have been taken all the same.
            await self._give_back(classifier_id, holder)
            raise
        renewing = asyncio.create_task(self._renew(classifier_id, holder))
        try:
            yield holder
        finally:
            renewing.cancel()
            await self._give_back(classifier_id, holder)

    async def _take(self, classifier_id: str, key_id: str, holder: str) -> None:
        patience = time.monotonic() + WAIT_SECONDS
        while True:
            taken = await self._table.take(classifier_id, key_id, holder, LEASE_SECONDS)
            if taken is Taken.YES:
                return
            if taken is Taken.MISSING:
                raise not_found(classifier_id)
            if time.monotonic() > patience:
                BUSY.inc()
                raise busy(classifier_id)
            await asyncio.sleep(_POLL_SECONDS)

    async def _renew(self, classifier_id: str, holder: str) -> None:
        """Keep the lease; without it, the version in the database cannot be replaced anyway."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                if not await self._table.renew(classifier_id, holder, LEASE_SECONDS):
                    return
            except ServiceError as error:
                logger.warning("cannot renew the lease on a classifier: %s", error)

    async def _give_back(self, classifier_id: str, holder: str) -> None:
        # In a task of its own, since the call may be being cancelled.
        task = asyncio.create_task(self._release(classifier_id, holder))
        await asyncio.shield(task)

    async def _release(self, classifier_id: str, holder: str) -> None:
        try:
            await self._table.release(classifier_id, holder)
        except ServiceError as error:
            logger.warning("a lease on a classifier is left to run out: %s", error)

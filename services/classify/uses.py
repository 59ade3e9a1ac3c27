"""Counting the use of classifiers: in memory call by call, to the database once a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from services.classify.table import ClassifierTable
from services.core.errors import ServiceError

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0


class UseCounter:
    """Counts without making a call wait. A killed process loses a second of counting at most.

    While the database is away counts are kept; there is one entry per classifier.
    """

    def __init__(self, table: ClassifierTable) -> None:
        self._table = table
        self._pending: dict[str, tuple[int, float]] = {}
        self._writing = asyncio.Lock()
        self._closing = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def count(self, classifier_id: str) -> None:
        """Count one call."""
        self._add(classifier_id, 1, time.time())

    def start(self) -> None:
        """Begin to write."""
        self._flusher = asyncio.create_task(self._flush_often())

    async def stop(self) -> None:
        """Write what is left, and end."""
        self._closing.set()
        if self._flusher is not None:
            await self._flusher
        if self._pending:
            logger.warning("lost the count of uses of %d classifiers", len(self._pending))

    async def flush(self) -> None:
        """Write what was counted; raises as the database does and then keeps it."""
        async with self._writing:
            pending, self._pending = self._pending, {}
            if not pending:
                return
            try:
                await self._table.add_uses(pending)
            except BaseException:
                for classifier_id, (number, last) in pending.items():
                    self._add(classifier_id, number, last)
                raise

    def _add(self, classifier_id: str, number: int, last: float) -> None:
        before, latest = self._pending.get(classifier_id, (0, 0.0))
        self._pending[classifier_id] = (before + number, max(latest, last))

    async def _flush_often(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), FLUSH_SECONDS)
            last = self._closing.is_set()
            try:
                # The database tells of its absence itself, and what is pending stays so.
                with contextlib.suppress(ServiceError):
                    await self.flush()
            except Exception:
                logger.exception("cannot write the uses of classifiers")
            if last:
                return

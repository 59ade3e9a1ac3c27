"""Figures of this room for /metrics.

The gauges tell of all unfinished jobs of the database, so every process that shares it reports the same: take
the maximum over processes, not the sum. The counters and the histogram are of this process' own work.
"""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

from services.batch.table import Backlog, JobTable

_CHUNK_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_JOBS = Gauge(
    "searchfoundation_batch_jobs",
    "Unfinished jobs of the whole store: queued without a line done, running after that.",
    ("status",),
)
_LINES = Gauge(
    "searchfoundation_batch_backlog_lines",
    "Lines not yet done of all unfinished jobs of the store; inputs by URL count once they were read.",
)
_AGE = Gauge(
    "searchfoundation_batch_backlog_age_seconds",
    "Age of the oldest unfinished job of the store; 0 without one.",
)
ENDS = Counter(
    "searchfoundation_batch_ended_jobs_total", "Jobs that this process ended, expiry left out.", ("status",)
)
LINES = Counter("searchfoundation_batch_lines_total", "Lines done by this process.", ("model", "outcome"))
CHUNK_SECONDS = Histogram(
    "searchfoundation_batch_chunk_seconds",
    "Time from beginning a chunk of a job to having stored it.",
    ("model",),
    buckets=_CHUNK_SECONDS,
)
TAKEOVERS = Counter(
    "searchfoundation_batch_takeovers_total", "Silent workers whose tasks this process put back."
)
WEBHOOKS = Counter("searchfoundation_batch_webhooks_total", "Attempts to tell a job's end.", ("outcome",))


class BacklogGauges:
    """The backlog as ``read`` found it last; a scrape reads nothing.

    While the database is away the figures stay as they were, and the age grows on.
    """

    def __init__(self, table: JobTable) -> None:
        self._table = table
        self._backlog = Backlog()
        _AGE.set_function(self._age)

    async def read(self) -> None:
        """Ask the database, which takes one aggregate over an index."""
        self._backlog = backlog = await self._table.backlog()
        _JOBS.labels("queued").set(backlog.queued)
        _JOBS.labels("running").set(backlog.running)
        _LINES.set(backlog.lines)

    def _age(self) -> float:
        oldest = self._backlog.oldest
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

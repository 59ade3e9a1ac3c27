"""The input of a job: brought here if it lies elsewhere, planned as chunks, read chunk by chunk."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from services.batch.keys import file_key, input_key
from services.batch.lines import Line, LineReader, split_lines
from services.batch.planning import TooManyLines, cut
from services.batch.sources import SourceError, Sources
from services.batch.table import BatchJob, Plan
from services.core.settings import Settings
from services.core.storage.objects import ObjectStore

logger = logging.getLogger(__name__)

MAX_LINES = 50_000

FETCH_SECONDS = 1.0
"""Half of what is waited before the second attempt at a URL; each further wait is twice as long."""

_FETCH_ATTEMPTS = 4


class UnusableInputError(Exception):
    """There is nothing to embed; the message is a sentence for the job's owner."""


@dataclass(frozen=True, slots=True)
class Planned:
    """An input of ``length`` bytes cut into chunks.

    ``name`` tells one fetched for it from those of other attempts, if any.
    """

    chunks: Sequence[Plan]
    name: str | None
    length: int


def input_of(job: BatchJob, name: str | None) -> str:
    """Give the key of a job's input, which may be a file that was uploaded before."""
    return input_key(job.id, name) if job.input_file is None else file_key(job.input_file)


class JobInputs:
    """Inputs of jobs, which are kept in the object store. Every method may raise ``ObjectStoreError``."""

    def __init__(
        self, settings: Settings, store: ObjectStore, elsewhere: Sources, reader: LineReader
    ) -> None:
        self._chunk_tokens = settings.batch_chunk_tokens
        self._reader = reader
        self._store = store
        self._elsewhere = elsewhere

    async def plan(self, job: BatchJob) -> Planned:
        """Fetch the input if it has a URL, and cut it into chunks. Raises ``UnusableInputError``.

        What is fetched gets a name of its own each time: what lies behind a URL may change, and a worker that
        was taken for dead may still be fetching when another has planned the job.
        """
        name = None if job.input_url is None else uuid.uuid4().hex[:12]
        key = input_of(job, name)
        length = job.input_bytes
        try:
            if job.input_url is not None:
                length = await self._fetch(key, job.input_url)
            async with aclosing(self._store.stream(key)) as pieces:
                plans = await cut(pieces, chunk_tokens=self._chunk_tokens, max_lines=MAX_LINES)
        except TooManyLines:
            raise UnusableInputError(f"The input has more than {MAX_LINES:,} lines.") from None
        except SourceError as refused:
            raise UnusableInputError(str(refused)) from refused
        if not plans:
            raise UnusableInputError("The input has no lines.")
        return Planned(plans, name, length)

    async def discard(self, job: BatchJob, planned: Planned) -> None:
        """Delete what was fetched for a plan that came too late."""
        if planned.name is not None:
            await self._store.delete([input_key(job.id, planned.name)])

    async def lines(self, job: BatchJob, plan: Plan) -> list[Line]:
        """Read the lines of a chunk."""
        key = input_of(job, job.input_name)
        data = await self._store.get(key, plan.start, plan.length) if plan.length else b""
        given = split_lines(data, plan.place) if plan.length else [(plan.place, b"")]
        return [
            self._reader.read(job, plan.first + number, place, line, plan.faults.get(number))
            for number, (place, line) in enumerate(given)
        ]

    async def _fetch(self, key: str, url: str) -> int:
        for attempt in range(1, _FETCH_ATTEMPTS + 1):
            try:
                async with aclosing(self._elsewhere.stream(url)) as pieces:
                    return await self._store.put_stream(key, pieces)
            except SourceError as error:
                if not error.retryable or attempt == _FETCH_ATTEMPTS:
                    raise
                logger.warning("%s cannot be fetched yet: %s", key, error)
            await asyncio.sleep(FETCH_SECONDS * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

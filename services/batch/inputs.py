"""The input of a job: brought here if it lies elsewhere, planned as chunks, read chunk by chunk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from services.batch.lines import (
    DUPLICATE,
    MAX_LINE_BYTES,
    TOO_LONG,
    Line,
    LineReader,
    custom_id_of,
    split_lines,
)
from services.batch.schema import file_key, input_key
from services.batch.table import BatchJob, Plan
from services.core.inference.submission import CHARACTERS_PER_TOKEN
from services.core.media.decoding import gunzipped
from services.core.media.fetching import Fetcher, FetchError, shown
from services.core.media.lines import TextLine, read_lines
from services.core.requests.fields import clean_url
from services.core.settings import ConfigurationError, Settings
from services.core.storage.objects import (
    ObjectMissingError,
    ObjectStore,
    ObjectStoreError,
    RemoteStore,
    bucket,
    is_key,
)

logger = logging.getLogger(__name__)


MAX_FETCHES = 256
"""Inputs fetched at a time by a process. Most of them wait, so many keys are needed to hold all places."""


class SourceError(Exception):
    """The input cannot be read; the text tells the caller why. ``retryable``: it may be later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Sources:
    """Input files behind https, s3 and gs URLs."""

    def __init__(self, settings: Settings) -> None:
        self._fetcher = Fetcher(settings, connections=MAX_FETCHES)
        self._buckets = tuple(f"{clean_url(opened).rstrip('/')}/" for opened in settings.batch_input_buckets)
        self._max_bytes = settings.batch_max_input_bytes

    async def close(self) -> None:
        """Close connections."""
        await self._fetcher.aclose()

    async def stream(self, url: str) -> AsyncGenerator[bytes]:
        """Read a file in pieces, gzip undone; raises ``SourceError``."""
        if url.startswith(("s3://", "gs://")):
            pieces = self._from_bucket(url)
        else:
            pieces = self._fetcher.stream(url, max_bytes=self._max_bytes)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        except FetchError as error:
            raise SourceError(error.of(shown(url)).detail, retryable=error.retryable) from error

    async def _from_bucket(self, url: str) -> AsyncGenerator[bytes]:
        scheme, _, rest = url.partition("://")
        place, _, key = rest.partition("/")
        if not place or not is_key(key):
            raise SourceError("The input URL names no object of a bucket.", retryable=False)
        # It is read with the server's own credentials, so only what the operator has opened.
        if not url.startswith(self._buckets):
            message = "The input URL is in no bucket that this server reads (SF_BATCH_INPUT_BUCKETS)."
            raise SourceError(message, retryable=False)
        try:
            store = RemoteStore(bucket(f"{scheme}://{place}", "input_url"))
            async with (
                aclosing(store.stream(key)) as stored,
                aclosing(gunzipped(stored, self._max_bytes)) as pieces,
            ):
                async for piece in pieces:
                    yield piece
        except ConfigurationError as error:
            raise SourceError(str(error), retryable=False) from error
        except ObjectMissingError as error:
            raise SourceError(f"There is no object '{shown(url)}'.", retryable=False) from error
        except ObjectStoreError as error:
            logger.warning("%s cannot be read: %s", shown(url), error)
            raise SourceError(f"'{shown(url)}' cannot be read by this server.", retryable=True) from error


MAX_CHUNK_LINES = 256

_LEAST_BYTES = 4096
_STEPS = 8
"""A chunk is at most this part of what stands before it in its input, or ``_LEAST_BYTES``."""

_PAUSE = 256
"""Lines read before the event loop gets its turn."""


class TooManyLines(Exception):  # noqa: N818 - told to the caller, no failure of ours
    """The input has more lines than a job may have."""


async def cut(pieces: AsyncIterator[bytes], *, chunk_tokens: int, max_lines: int) -> list[Plan]:
    """Plan the chunks of an input that comes in ``pieces``, in memory for its line names only.

    The same input gives the same plan. Raises ``TooManyLines``.
    """
    planner = _Planner(chunk_tokens)
    count = 0
    async with aclosing(read_lines(pieces, MAX_LINE_BYTES)) as lines:
        async for line in lines:
            count += 1
            if count > max_lines:
                raise TooManyLines
            planner.add(line)
            if count % _PAUSE == 0:
                await asyncio.sleep(0)
    return planner.finish()


class _Planner:
    """Puts one line after the other into the open chunk, and closes it when it is full."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_bytes = chunk_tokens * CHARACTERS_PER_TOKEN
        self._seen: dict[bytes, int] = {}
        self._plans: list[Plan] = []
        self._first = self._place = 0
        self._lines = self._start = self._end = 0
        self._faults: dict[int, str] = {}

    def add(self, line: TextLine) -> None:
        if line.too_long:
            self._close()
            # Nobody has to read it again: its chunk has no bytes.
            self._append(1, line.start, 0, {0: TOO_LONG}, line.number)
            return
        end = line.start + line.length
        if end - self._start > self._room() or self._lines >= MAX_CHUNK_LINES:
            self._close()
        if not self._lines:
            self._start, self._place = line.start, line.number
        if (earlier := self._earlier(line)) is not None:
            self._faults[self._lines] = f"{DUPLICATE}:{earlier}"
        self._lines += 1
        self._end = end

    def _room(self) -> int:
        """Bytes of the open chunk: few at first, so that who watches a small job sees it move as well."""
        return min(self._chunk_bytes, max(_LEAST_BYTES, self._start // _STEPS))

    def finish(self) -> list[Plan]:
        self._close()
        return self._plans

    def _close(self) -> None:
        if self._lines:
            self._append(self._lines, self._start, self._end - self._start, self._faults, self._place)
            self._lines, self._faults = 0, {}

    def _append(self, lines: int, start: int, length: int, faults: Mapping[int, str], place: int) -> None:
        self._plans.append(Plan(self._first, lines, start, length, faults, place))
        self._first += lines

    def _earlier(self, line: TextLine) -> int | None:
        """Give the place of the line that had this one's name before it."""
        custom_id = custom_id_of(line.data)
        if custom_id is None:
            return None
        name = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._seen.setdefault(name, line.number)
        return None if earlier == line.number else earlier


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

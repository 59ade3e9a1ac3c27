"""What callers can do with jobs, for every door."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

import orjson

from services.batch.files import Files, StoredFile
from services.batch.jobs import JobEngine
from services.batch.quotas import Holdings, check
from services.batch.schema import (
    BatchRequest,
    File,
    JobForm,
    JobStatus,
    State,
    ended,
    file_not_found,
    input_key,
    is_job_id,
    new_job_id,
    not_ended,
    not_found,
)
from services.batch.table import BatchJob, JobTable
from services.batch.worker import Worker, open_task
from services.core.content import Media
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.settings import Settings, Tier
from services.core.storage.disk import Disk
from services.core.storage.objects import ObjectMissingError, ObjectStore, ObjectStoreError

POLL_SECONDS = 2.0
"""What a caller is told to wait before asking again."""

_WATCH_SECONDS = 0.5
_PIECE_BYTES = 1 << 18
_AS_SENT = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATACLASS
_RETRY_SECONDS = 5.0

CheckUrl = Callable[[str], Awaitable[str | None]]
"""Says what is wrong with a URL that will be called, None for nothing."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The id of the key that asks, and its tier."""

    key_id: str
    tier: str


class Download:
    """A file of a job, ready to be read."""

    def __init__(self, batch_id: str, file: File, stored: StoredFile) -> None:
        self.length = stored.length
        self._batch_id = batch_id
        self._file = file
        self._stored = stored

    async def pieces(self, asked: range | None = None) -> AsyncGenerator[bytes]:
        """Read it, or the bytes ``asked`` of it; raises ``ServiceError`` as ``BatchService.open`` does."""
        try:
            async with aclosing(self._stored.pieces(asked)) as pieces:
                async for piece in pieces:
                    yield piece
        except ObjectMissingError as error:
            raise file_not_found(self._batch_id, self._file) from error
        except ObjectStoreError as error:
            raise store_away() from error


class BatchService:
    """Jobs of callers; ``key_id`` is always the id of the key that asks."""

    def __init__(
        self,
        jobs: JobEngine,
        table: JobTable,
        store: ObjectStore,
        files: Files,
        worker: Worker,
        check_webhook: CheckUrl,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._table = table
        self._store = store
        self._files = files
        self._worker = worker
        self._check_webhook = check_webhook
        self._expire_seconds = settings.batch_expire_seconds
        self._tiers = settings.tiers
        self._disk = Disk.of(settings)

    async def create(self, request: BatchRequest, caller: Caller, base_url: str) -> JobStatus:
        """Store a job; when this returns it will be done.

        Raises ``ServiceError``: AUTHZ_RESOURCE_LIMIT_EXCEEDED naming the quota that is used up, STORAGE_FULL.
        """
        await asyncio.to_thread(self._disk.require_room, "batch jobs")
        more = Holdings(jobs=1, lines=len(request.lines or ()), webhooks=request.webhook_url is not None)
        tier = self._tiers[caller.tier]
        # Before anything is written, and again where nobody can come between.
        used = await self._table.usage(caller.key_id)
        check(tier, used, more)
        await self._require_share(used)
        url = request.webhook_url
        if url is not None and (wrong := await self._check_webhook(url)) is not None:
            place = f"body -> {request.model} -> webhook_url"
            raise validation_error([FieldError(place, wrong, "webhook_url", url)])
        now = time.time()
        job = BatchJob(
            id=new_job_id(),
            owner=caller.key_id,
            tier=caller.tier,
            model=request.model,
            task=request.task,
            dimensions=request.dimensions,
            normalized=request.normalized,
            input_url=request.input_url,
            webhook_url=request.webhook_url,
            created_at=now,
            expires_at=now + self._expire_seconds,
            base_url=base_url,
            total=len(request.lines or ()),
            form=request.form,
            input_file=request.input_file,
            metadata=request.metadata,
        )
        if request.lines is not None:
            try:
                length = await self._store.put_stream(input_key(job.id), _written(request.lines))
            except ObjectStoreError as error:
                raise store_away() from error
            job = replace(job, input_bytes=length)
        try:
            await self._table.create(
                job, lambda used: check(tier, used, replace(more, stored_bytes=job.input_bytes))
            )
        except ServiceError:
            await self._files.delete_input(job)
            raise
        await self._jobs.submit(open_task(job))
        return await self._files.status(job)

    async def status(self, batch_id: str, key_id: str) -> JobStatus:
        """Tell how far a job is."""
        return await self._told(await self._find(batch_id, key_id))

    async def list(self, key_id: str, limit: int) -> list[JobStatus]:
        """Tell of the newest jobs."""
        return [await self._told(job) for job in await self._table.list(key_id, limit)]

    async def watch(self, batch_id: str, key_id: str) -> AsyncIterator[JobStatus]:
        """Tell how far a job is now, at every change, and at its end."""
        before: JobStatus | None = None
        while True:
            status = await self.status(batch_id, key_id)
            if status != before:
                yield status
            if status.state.ended:
                return
            before = status
            await asyncio.sleep(_WATCH_SECONDS)

    async def cancel(self, batch_id: str, key_id: str) -> JobStatus:
        """Cancel a job; raises CONFLICT_STATE for one that has ended."""
        job = await self._find(batch_id, key_id)
        state = (await self._files.status(job)).state
        if state.ended or not await self._cancel(job):
            job = await self._find(batch_id, key_id)
            raise ended(batch_id, state if state is State.EXPIRED else job.state)
        self._worker.cancel(job.id)
        with suppress(ServiceError):  # tasks that cannot be dropped now find a job that has ended
            await self._jobs.cancel(job.id)
        return await self._told(await self._find(batch_id, key_id))

    async def _require_share(self, used: Holdings) -> None:
        """Keep the last room above the reserve for keys that do not hold most of what is stored."""
        if not used.stored_bytes or not await asyncio.to_thread(lambda: self._disk.tight):
            return
        if 2 * used.stored_bytes > await self._table.stored_bytes():
            raise ServiceError(ErrorCode.STORAGE_FULL, what="batch jobs of a key that holds most of it")

    async def _cancel(self, job: BatchJob) -> bool:
        try:
            return await self._worker.end(job.id, State.CANCELLED)
        except ServiceError:
            if not await asyncio.to_thread(lambda: self._disk.full):
                raise
        # To note that a job is cancelled takes a little room, which its input holds.
        await self._files.delete_input(job)
        return await self._worker.end(job.id, State.CANCELLED)

    async def quota(self, caller: Caller) -> tuple[Holdings, Tier]:
        """Tell what a caller has stored and unfinished, and what it may have."""
        return await self._table.usage(caller.key_id), self._tiers[caller.tier]

    async def open(self, batch_id: str, key_id: str, file: File) -> Download:
        """Find a file of a job.

        Raises ``ServiceError``: CONFLICT_RESOURCE_BUSY before the job has ended, RESOURCE_NOT_FOUND for a
        file that is not there.
        """
        job = await self._find(batch_id, key_id)
        state = (await self._files.status(job)).state
        if not state.ended:
            raise not_ended(batch_id, POLL_SECONDS)
        if not self._files.has(job, state, file):
            raise file_not_found(batch_id, file)
        return Download(batch_id, file, await self._files.open(job, file))

    async def job(self, batch_id: str, key_id: str) -> BatchJob:
        """Give a job as it is kept, expired as soon as its time is over."""
        return _now(await self._find(batch_id, key_id))

    async def page(self, key_id: str, form: JobForm, after: str | None, limit: int) -> list[BatchJob]:
        """Give the newest jobs of a form behind the job ``after``."""
        return [_now(job) for job in await self._table.page(key_id, form, after, limit)]

    async def _find(self, batch_id: str, key_id: str) -> BatchJob:
        job = await self._table.find(batch_id) if is_job_id(batch_id) else None
        if job is None or job.owner != key_id:
            raise not_found(batch_id)
        return job

    async def _told(self, job: BatchJob) -> JobStatus:
        try:
            return await self._files.status(job)
        except ObjectStoreError as error:
            raise store_away() from error


class Housekeeper:
    """Deletes what has expired, and hands out again what may have been lost between two steps."""

    _STALLED_SECONDS = 60.0
    _FORGET_SECONDS = 30 * 86_400.0
    _AT_ONCE = 100

    def __init__(self, jobs: JobEngine, table: JobTable, files: Files, worker: Worker) -> None:
        self._jobs = jobs
        self._table = table
        self._files = files
        self._worker = worker

    async def look(self) -> None:
        """Look after jobs once."""
        now = time.time()
        for job in await self._table.expired(now, self._AT_ONCE):
            self._worker.cancel(job.id)
            await self._table.expire(job.id, now)
            await self._files.delete(job.id)
            await self._jobs.forget(job.id)
        for job in await self._table.stalled(now - self._STALLED_SECONDS, self._AT_ONCE):
            await self._jobs.submit(open_task(job))
        await self._table.forget(now - self._FORGET_SECONDS)


def _now(job: BatchJob) -> BatchJob:
    return replace(job, state=State.EXPIRED) if job.expires_at <= time.time() else job


async def _written(lines: Sequence[Any]) -> AsyncIterator[bytes]:
    """Write lines in pieces of about a size that is soon made; those that are bytes as they are."""
    piece = bytearray()
    for line in lines:
        if isinstance(line, memoryview):
            for first in range(0, len(line), _PIECE_BYTES):
                # A line end between the values of a line is a blank like others.
                piece += bytes(line[first : first + _PIECE_BYTES]).replace(b"\n", b" ")
                if len(piece) >= _PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
            piece += b"\n"
        else:
            piece += orjson.dumps(
                line, _as_sent, orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATACLASS
            )
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)
    if piece:
        yield bytes(piece)


def _as_sent(value: object) -> str:
    """Give a picture, sound, film or PDF as the REST side takes it."""
    if not isinstance(value, Media):
        raise TypeError(f"a line holds {type(value).__name__}")
    return value.source if isinstance(value.source, str) else b64encode(value.source).decode()


def store_away() -> ServiceError:
    """Say that files can be neither read nor written just now."""
    return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SECONDS)

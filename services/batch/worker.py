"""Doing the tasks of jobs: preparing, embedding chunks, ending, telling."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import orjson

from services.batch.embedding import ChunkEmbedder, Results
from services.batch.files import Files
from services.batch.inputs import JobInputs, Planned, UnusableInputError
from services.batch.jobs import JobEngine, Task, TaskKind
from services.batch.metrics import CHUNK_SECONDS, ENDS, LINES, WEBHOOKS
from services.batch.quotas import Holdings, check
from services.batch.schema import File, State, part_key, status_json
from services.batch.table import UNPLANNED, BatchJob, Chunk, ChunkFiles, ChunkOutcome, JobTable
from services.batch.webhook import Delivery, Webhooks
from services.core.access.balances import Balances
from services.core.access.metrics import KeyUsage
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine
from services.core.settings import Settings
from services.core.storage.objects import ObjectStore, ObjectStoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_SECONDS = (0.2, 10.0)
_WEBHOOK_ATTEMPTS = 10
_WEBHOOK_SECONDS = 1.0
"""Before the second attempt; each further wait is twice as long."""
_LOOK_EVERY = 16
"""Chunks handed out before looking whether the job was cancelled meanwhile."""
_SPENT = "The balance of the key is used up. What was embedded until then can be downloaded."
_BROKEN = "An unexpected error ended the job; the server's log says more."


class Worker:
    """Does tasks. While the database or the object store is away it waits for them."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        jobs: JobEngine,
        table: JobTable,
        store: ObjectStore,
        files: Files,
        inputs: JobInputs,
        webhooks: Webhooks,
        balances: Balances,
    ) -> None:
        self._embedder = ChunkEmbedder(engine)
        self._jobs = jobs
        self._table = table
        self._store = store
        self._files = files
        self._inputs = inputs
        self._webhooks = webhooks
        self._balances = balances
        self._usage = KeyUsage()
        self._turns = asyncio.Semaphore(settings.batch_concurrency)
        self._tiers = settings.tiers
        self._at_work: dict[str, set[asyncio.Task[Any]]] = {}

    async def do(self, task: Task) -> None:
        """Do a task to its end. It only raises when it is cancelled."""
        delay = _RETRY_SECONDS[0]
        while True:
            try:
                await self._do(task)
                return
            except ObjectStoreError as error:
                logger.warning("%s waits for the object store: %s", task.id, error)
            except ServiceError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    logger.exception("%s failed unexpectedly", task.id)
                    await self._break(task)
                    return
                logger.warning("%s waits: %s", task.id, error)
            except Exception:
                logger.exception("%s failed unexpectedly", task.id)
                await self._break(task)
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_SECONDS[1])

    def cancel(self, job_id: str) -> None:
        """Interrupt what this process is doing for a job: fetching its input, or chunks."""
        for task in self._at_work.get(job_id, ()):
            task.cancel()

    async def interrupt(self) -> None:
        """Interrupt the work on jobs that were cancelled or expired elsewhere."""
        if at_work := set(self._at_work):
            for job_id in at_work - await self._table.wanted(at_work):
                self.cancel(job_id)

    async def _do(self, task: Task) -> None:
        if task.kind is TaskKind.CHUNK:
            await self._interruptible(task.job_id, self._chunk(task.job_id, task.number))
        elif (job := await self._table.find(task.job_id)) is not None:
            await (self._notify(job, task.number) if task.kind is TaskKind.NOTIFY else self._prepare(job))

    async def _interruptible(self, job_id: str, work: Coroutine[Any, Any, T]) -> T | None:
        """Do something for a job in a task of its own; None when cancelling the job interrupted it."""
        doing = asyncio.create_task(work)
        tasks = self._at_work.setdefault(job_id, set())
        tasks.add(doing)
        try:
            await asyncio.wait([doing])
        except asyncio.CancelledError:
            doing.cancel()
            raise
        finally:
            tasks.discard(doing)
            if not tasks:
                self._at_work.pop(job_id, None)
        return None if doing.cancelled() else doing.result()

    async def _break(self, task: Task) -> None:
        """End a job that cannot go on."""
        while True:
            with contextlib.suppress(ServiceError):
                await self.end(task.job_id, State.FAILED, _BROKEN)
                return
            await asyncio.sleep(_RETRY_SECONDS[1])

    async def end(self, job_id: str, state: State, error: str | None = None) -> bool:
        """End a job that has not ended, and see that its end is told; false when it had ended."""
        ended = await self._table.end(job_id, state, time.time(), error=error)
        job = await self._table.find(job_id)
        if ended and job is not None:
            ENDS.labels(state.value).inc()
            await self._files.delete_input(job)
        if job is not None and job.webhook_url is not None and not job.webhook_ended and job.state.ended:
            await self._jobs.submit(open_task(job))
        return ended

    # Preparing

    async def _prepare(self, job: BatchJob) -> None:
        """Fetch the input, plan the chunks, hand them out."""
        if job.state.ended or job.expires_at <= time.time():
            return
        if job.chunks == UNPLANNED:
            try:
                planned = await self._interruptible(job.id, self._inputs.plan(job))
            except UnusableInputError as error:
                await self._refuse(job.id, str(error))
                return
            if planned is None:
                return
            try:
                waits = await self._table.plan(
                    job, planned.chunks, planned.name, planned.length, partial(self._check, job, planned)
                )
            except ServiceError as error:
                await self._inputs.discard(job, planned)
                if error.code is not ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED:
                    raise
                await self._refuse(job.id, error.detail)
                return
            if not waits:
                await self._inputs.discard(job, planned)
                return
        for position, number in enumerate(await self._table.open_chunks(job.id)):
            if position % _LOOK_EVERY == 0 and not await self._goes_on(job.id):
                await self._jobs.cancel(job.id)
                return
            await self._jobs.submit(Task(TaskKind.CHUNK, job.id, job.model, job.owner, number))

    def _check(self, job: BatchJob, planned: Planned, usage: Holdings) -> None:
        """Hold an input that was only now seen whole to the quotas of its owner."""
        tier = self._tiers.get(job.tier)
        if job.total == 0 and tier is not None:
            lines = sum(plan.lines for plan in planned.chunks)
            check(tier, usage, Holdings(lines=lines, stored_bytes=planned.length))

    async def _goes_on(self, job_id: str) -> bool:
        job = await self._table.find(job_id)
        return job is not None and job.state is State.PROCESSING

    async def _refuse(self, job_id: str, error: str) -> None:
        """End a job whose input is no good, unless another worker has found it good meanwhile."""
        job = await self._table.find(job_id)
        if job is None or job.chunks != UNPLANNED or not await self.end(job_id, State.FAILED, error):
            return
        # Should this fail, it is deleted when the job expires.
        with contextlib.suppress(ObjectStoreError):
            await self._files.delete(job_id)

    # Embedding

    async def _chunk(self, job_id: str, number: int) -> None:
        async with self._turns:
            job = await self._table.find(job_id)
            if job is None or job.state is not State.PROCESSING or job.expires_at <= time.time():
                return
            left = await self._balances.left(job.owner)
            if left is not None and left <= 0:
                await self.end(job_id, State.FAILED, _SPENT)
                return
            began = time.monotonic()
            chunk = await self._table.begin_chunk(job_id, number)
            if chunk is not None:
                if not await self._results(job, number, chunk):
                    return
                CHUNK_SECONDS.labels(job.model).observe(time.monotonic() - began)
        await self._finish(job_id)

    async def _results(self, job: BatchJob, number: int, chunk: Chunk) -> bool:
        """Embed a chunk and store what comes of it; false when the job goes on without it."""
        try:
            lines = await self._inputs.lines(job, chunk.plan)
            if chunk.attempts == 1:
                results = await self._embedder.embed(job, lines)
            else:

                async def note(tries: Mapping[str, int]) -> None:
                    await self._table.note_tries(job.id, number, tries)

                results = await self._embedder.embed_warily(job, lines, chunk.tries, note)
            return await self._store_results(job, number, results)
        except (ObjectStoreError, ServiceError, asyncio.CancelledError):
            # The worker is alive: this attempt is none that ended one.
            with contextlib.suppress(ServiceError):
                await self._table.give_back_chunk(job.id, number, chunk.tries)
            raise

    async def _store_results(self, job: BatchJob, number: int, results: Results) -> bool:
        name = f"{number:06d}-{uuid.uuid4().hex[:12]}"
        written = {File.OUTPUT: _joined(results.output), File.ERRORS: _joined(results.errors)}
        keys = [part_key(job.id, name, file) for file, data in written.items() if data]
        for file, data in written.items():
            if data:
                await self._store.put(part_key(job.id, name, file), data)
        part = ChunkFiles(number, name, len(written[File.OUTPUT]), len(written[File.ERRORS]))
        outcome = ChunkOutcome(part, len(results.output), len(results.errors), results.tokens)
        if not await self._table.end_chunk(job, outcome):
            # Another worker was quicker, or the job has ended meanwhile.
            await self._store.delete(keys)
            return False
        self._usage.count(job.owner, results.tokens)
        LINES.labels(job.model, "completed").inc(outcome.completed)
        LINES.labels(job.model, "failed").inc(outcome.failed)
        return True

    # Ending

    async def _finish(self, job_id: str) -> None:
        """End a job whose chunks are all done."""
        if await self._table.has_open_chunk(job_id):
            return
        job = await self._table.find(job_id)
        if job is None:
            return
        if job.state is State.PROCESSING and not job.joined and await self._files.join(job):
            await self._table.join(job_id)
        if job.completed:
            await self.end(job_id, State.COMPLETED)
        elif job.state is State.PROCESSING:
            await self.end(job_id, State.FAILED, await self._files.first_fault(job))

    async def _notify(self, job: BatchJob, attempt: int) -> None:
        """Send the status once; what waits for a further attempt waits in no place."""
        if job.webhook_url is None or job.webhook_ended:
            return
        tries = job.webhook_tries
        if tries == attempt:  # else this worker died behind the attempt
            payload = orjson.dumps(status_json(await self._files.status(job)))
            event_id = f"evt_{job.id.removeprefix('batch_')}_{job.state.value}"
            delivery = await self._webhooks.deliver(job.webhook_url, payload, event_id)
            WEBHOOKS.labels(delivery.value).inc()
            last = delivery is not Delivery.RETRY or tries + 1 >= _WEBHOOK_ATTEMPTS
            if last and delivery is not Delivery.DELIVERED:
                logger.warning("the end of %s was not told: %s", job.id, delivery.name)
            tries = await self._table.tried_webhook(job.id, ended=last)
            if last:
                return
        await self._jobs.submit(
            open_task(replace(job, webhook_tries=tries)), _WEBHOOK_SECONDS * 2 ** (tries - 1)
        )


def open_task(job: BatchJob) -> Task:
    """Give the task that a job waits for which has not begun, or has ended and is to be told."""
    if job.state.ended:
        return Task(TaskKind.NOTIFY, job.id, job.model, job.owner, job.webhook_tries)
    return Task(TaskKind.PREPARE if job.input_url is None else TaskKind.FETCH, job.id, job.model, job.owner)


def _joined(lines: Mapping[int, bytes]) -> bytes:
    return b"".join(lines[number] for number in sorted(lines))

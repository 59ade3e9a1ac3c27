"""Between the event loop and the workers: admission, waiting for a job, errors, draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.jobs import AnyJob, AnyLane, Job
from services.core.inference.metrics import EngineMetrics
from services.core.inference.scheduler import QueueFullError, Scheduler
from services.core.inference.worker import Device, DeviceLostError, ExpiredError, ItemTooLargeError, Workers

_log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

_RETRY_SOON = 1.0
_RETRY_AT_MOST = 60.0

_RESERVED_PART = 16
"""A tenant with less than this part of the queue in it is let in though others fill it. All of these
together are at most as much again as the queue takes."""

_LAST_BATCH_SECONDS = 1.0
"""What a batch that runs when the grace is over still gets."""


class InferenceError(Exception):
    """A model failed on an input; the cause has the model's own error."""


class Runtime:
    """One device with its queue and workers, as seen from one event loop.

    With ``gathers`` a batch is cut when the event loop has no other call at hand that could be in it: where
    passes are over in a millisecond, many small ones cost the interpreter more than they bring the device.
    ``on_failure`` is called in a worker's thread when a worker has died.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        *,
        workers: int,
        background: int = 0,
        gathers: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = EngineMetrics()
        self._loop = asyncio.get_running_loop()
        self._workers = Workers(
            scheduler,
            device,
            self._metrics,
            count=workers,
            background=background,
            deliver=self._deliver,
            on_death=self._on_death,
        )
        self._gathers = gathers
        self._gathering = False
        self._promised_tokens = 0
        self._reserved = 0
        self._inside: dict[str, int] = {}
        self._calls = 0
        self._closing = False
        self._idle = asyncio.Event()
        self.on_failure: Callable[[], None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether all workers are alive and calls are taken."""
        return self._workers.death is None and not self._closing

    def add(self, lane: AnyLane) -> None:
        """Announce a lane before its first job."""
        self._metrics.add(lane)

    def start(self) -> None:
        """Start the workers."""
        self._workers.start()

    def admitted(self, lane: AnyLane, items: int, tokens: int, key_id: str = "") -> Reservation:
        """Let a call in that will queue ``items`` of about ``tokens``, while the reservation is held.

        Raises ServiceError SERVICE_UNAVAILABLE when the queue is full or the engine stops. A queue that
        others have filled has room for a little of each tenant's.
        """
        if not self.healthy:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SOON)
        try:
            self._scheduler.check_room(self._promised_tokens)
        except QueueFullError as full:
            if self._has_reserve(full, tokens, key_id):
                return Reservation(self, tokens, key_id, reserved=True)
            self._metrics.dropped(lane, items, "refused")
            raise self._refusal(full) from None
        return Reservation(self, tokens, key_id)

    async def run(self, job: Job[P, R], call: Call) -> list[R]:
        """Queue ``job`` for ``call`` and wait for its results; see ``EmbeddingModel.embed`` for errors."""
        done: asyncio.Future[None] = self._loop.create_future()

        def wake(_: AnyJob) -> None:
            if not done.done():
                done.set_result(None)

        job.key_id, job.priority, job.deadline = call.key_id, call.priority, call.deadline
        job.on_done = wake
        self._submit(job)
        timer = None
        if call.deadline is not None:
            delay = call.deadline - time.monotonic()
            timer = self._loop.call_later(delay, self._expire, job, done)
        try:
            await done
        except asyncio.CancelledError:
            self._workers.cancel(job, "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if job.error is not None:
            raise _translated(job, job.error, call)
        call.timings.queue += job.started_at - job.queued_at
        call.timings.inference += job.finished_at - job.started_at
        return job.results  # type: ignore[return-value]  (all set when a job is done without an error)

    def when_over(self, job: AnyJob, then: Callable[[], None]) -> None:
        """Call ``then`` on the event loop once no pass has anything of ``job``, whose ``run`` has ended.

        A pass that has begun outlives a call that was cancelled, failed or came to its deadline.
        """

        def in_loop() -> None:
            try:
                self._loop.call_soon_threadsafe(then)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise

        if job.pending and job.running:
            self._workers.when_over(job, in_loop)
        else:
            then()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those inside finish for up to ``grace`` seconds, end the workers."""
        until = time.monotonic() + grace
        self._closing = True
        if self._calls and self._workers.death is None:
            try:
                await asyncio.wait_for(self._idle.wait(), grace)
            except TimeoutError:
                _log.warning("%d calls not finished after %g s of grace", self._calls, grace)
        last_batch = max(_LAST_BATCH_SECONDS, until - time.monotonic())
        left = await asyncio.to_thread(self._workers.stop, last_batch)
        for job in left:
            job.done = True
            job.error = DeviceLostError("the engine stopped")
        _finish_all(left)

    def _has_reserve(self, full: QueueFullError, tokens: int, key_id: str) -> bool:
        filled = self._scheduler.queued_tokens + self._promised_tokens
        limit = filled - full.excess_tokens + 1
        little = self._inside.get(key_id, 0) + tokens <= limit // _RESERVED_PART
        return little and self._reserved + tokens <= limit

    def enter(self, tokens: int, key_id: str, *, reserved: bool) -> None:
        """Count a call in; ``reserved`` is one that came into a full queue."""
        self._calls += 1
        self._reserved += tokens * reserved
        self._inside[key_id] = self._inside.get(key_id, 0) + tokens
        self._promised_tokens += tokens

    def counted(self, tokens: int) -> None:
        """Take back a promise: the real tokens are about to be queued."""
        self._promised_tokens -= tokens

    def leave(self, tokens: int, key_id: str, *, reserved: bool) -> None:
        """Count a call out."""
        self._calls -= 1
        self._reserved -= tokens * reserved
        left = self._inside.pop(key_id, 0) - tokens
        if left > 0:
            self._inside[key_id] = left
        if self._closing and self._calls == 0:
            self._idle.set()

    def _submit(self, job: AnyJob) -> None:
        try:
            gathering = self._workers.submit(job, gather=self._gathers)
        except DeviceLostError:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SOON) from None
        if gathering and not self._gathering:
            # Comes behind all that is ready to run now: calls that go on from the batch before, for one.
            self._gathering = True
            self._loop.call_soon(self._gathered)

    def _gathered(self) -> None:
        self._gathering = False
        self._workers.gathered()

    def _refusal(self, full: QueueFullError) -> ServiceError:
        backlog = self._metrics.backlog_seconds(self._workers.count)
        seconds = backlog * full.excess_tokens / max(1, self._scheduler.queued_tokens)
        wait = min(max(seconds, _RETRY_SOON), _RETRY_AT_MOST)
        return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=wait)

    def _expire(self, job: AnyJob, done: asyncio.Future[None]) -> None:
        if done.done():
            return
        self._workers.cancel(job, "expired")
        job.error = ExpiredError("the deadline passed")
        done.set_result(None)

    def _deliver(self, jobs: list[AnyJob]) -> None:
        try:
            self._loop.call_soon_threadsafe(_finish_all, jobs)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            _log.warning("the event loop ended with %d jobs running", len(jobs))

    def _on_death(self, error: BaseException) -> None:
        del error
        if self.on_failure is not None:
            self.on_failure()


class Reservation:
    """A call inside the engine; a context manager."""

    __slots__ = ("_key_id", "_promised", "_reserved", "_runtime", "_tokens")

    def __init__(self, runtime: Runtime, tokens: int, key_id: str, *, reserved: bool = False) -> None:
        self._runtime = runtime
        self._tokens = self._promised = tokens
        self._key_id = key_id
        self._reserved = reserved

    def __enter__(self) -> Reservation:
        self._runtime.enter(self._tokens, self._key_id, reserved=self._reserved)
        return self

    def counted(self) -> None:
        """The call's tokens are known and go to the queue now."""
        self._runtime.counted(self._promised)
        self._promised = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime.counted(self._promised)
        self._runtime.leave(self._tokens, self._key_id, reserved=self._reserved)


def _finish_all(jobs: list[AnyJob]) -> None:
    for job in jobs:
        if job.on_done is not None:
            job.on_done(job)


def _translated(job: AnyJob, error: BaseException, call: Call) -> BaseException:
    """Turn a job's error into what the caller is told; an unexpected one keeps its cause for the log."""
    if isinstance(error, ExpiredError) and call.deadline is not None:
        return ServiceError(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=round(call.deadline - call.started, 3))
    if isinstance(error, (DeviceLostError, ItemTooLargeError)):
        return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SOON)
    failure = InferenceError(f"{job.lane.name} failed on an input")
    failure.__cause__ = error
    return failure

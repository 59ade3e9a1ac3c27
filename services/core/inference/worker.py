"""The threads that keep a device busy: they take batches from the scheduler, run them, hand results out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from services.core.call import Priority
from services.core.inference.jobs import AnyJob, AnyLane, Batch, Share
from services.core.inference.scheduler import Scheduler

_log = logging.getLogger(__name__)

_CALM_SECONDS = 2.0
"""Without a call, after which the background has all cores."""


class ExpiredError(Exception):
    """The deadline passed before all items were run."""


class DeviceLostError(Exception):
    """The device answers no more; every later call would fail too."""


class ItemTooLargeError(Exception):
    """The device has no room even for this item alone."""


class Device(Protocol):
    """What the workers need to know of a device."""

    def claim_cores(self, alone: bool) -> None:
        """Called in a worker's thread before each batch; ``alone`` if no other worker has work."""
        ...

    def give_way(self) -> None:
        """Called once in the thread of each worker of the background, before its first batch."""
        ...

    def out_of_memory(self, error: Exception) -> bool:
        """Whether ``error`` means that the batch did not fit. Frees what can be freed."""
        ...

    def lost(self, error: Exception) -> bool:
        """Whether ``error`` means that the device is unusable from now on."""
        ...


class Observer(Protocol):
    """What is told about the work, for metrics. Called in worker threads."""

    def ran(self, batch: Batch, seconds: float) -> None:
        """A batch is through, retries included."""
        ...

    def split(self, lane: AnyLane, out_of_memory: bool) -> None:
        """A batch failed and is tried again in halves."""
        ...

    def dropped(self, lane: AnyLane, items: int, reason: str) -> None:
        """Items left without having been run."""
        ...


class _WorkerGroup:
    """Threads that wait for the same work: that of one class, or any."""

    def __init__(self, lock: threading.Lock, count: int, only: Priority | None) -> None:
        self.count = count
        self.only = only
        self.idle = 0
        self._work = threading.Condition(lock)
        self._called = 0

    @property
    def background(self) -> bool:
        """Whether it takes only what nobody waits for."""
        return self.only is Priority.BATCH

    def wait(self, seconds: float | None) -> None:
        """Wait for ``call``, or so long. To be called with the lock held, as ``call`` and ``call_all``."""
        self.idle += 1
        self._work.wait(seconds)
        self.idle -= 1
        self._called = max(0, self._called - 1)

    def call(self) -> None:
        """Let one more of those that wait come, if there is one that was not called yet."""
        if self.idle > self._called:
            self._called += 1
            self._work.notify()

    def call_all(self) -> None:
        """Let all come that wait."""
        self._called = self.idle
        self._work.notify_all()


class Workers:
    """``count`` threads over one scheduler and one device, and ``background`` more for batch work, if any.

    With workers of the background the others leave all batch work to them: the device, which was told to let
    the others go first, shares itself. While calls come one of the background's workers rests, if there are
    two, so that whoever has a part in a call (event loops, the gateway, the caller) finds a core free.

    ``deliver`` gets the jobs that are over, in a worker's thread and outside of any lock. ``on_death`` is
    called once, in the dying thread, when a worker ends otherwise than by ``stop``; by then all jobs that
    had work left are failed with that error and delivered, and ``submit`` raises it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        observer: Observer,
        *,
        count: int,
        background: int = 0,
        deliver: Callable[[list[AnyJob]], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._scheduler = scheduler
        self._device = device
        self._observer = observer
        self._deliver = deliver
        self._on_death = on_death
        self._lock = threading.Lock()
        if background:
            groups = (
                _WorkerGroup(self._lock, count, Priority.INTERACTIVE),
                _WorkerGroup(self._lock, background, Priority.BATCH),
            )
        else:
            groups = (_WorkerGroup(self._lock, count, None),)
        self._groups = groups
        self._running: dict[threading.Thread, Batch | None] = {}
        self._stopping = False
        self._gathering = False
        self._last_call = float("-inf")
        self.count = count
        self.death: BaseException | None = None

    def start(self) -> None:
        """Start the threads."""
        for group in self._groups:
            name = "background" if group.background else "device"
            for i in range(group.count):
                thread = threading.Thread(target=self._main, args=(group,), name=f"{name}-{i}", daemon=True)
                self._running[thread] = None
        for thread in list(self._running):
            thread.start()

    def stop(self, timeout: float) -> list[AnyJob]:
        """End the threads after the batches they run; returns the jobs that were still queued.

        A thread that is not back after ``timeout`` seconds is left behind; it ends with the process.
        """
        with self._lock:
            self._stopping = True
            left = self._scheduler.drain()
            self._wake_all()
        until = time.monotonic() + timeout
        for thread in list(self._running):
            thread.join(max(0.0, until - time.monotonic()))
        return left

    def submit(self, job: AnyJob, *, gather: bool = False) -> bool:
        """Queue a job. Raises DeviceLostError when no worker runs any more.

        With ``gather`` more are about to come: unless a full batch waits already no worker takes anything
        before ``gathered``, and the result is True.
        """
        with self._lock:
            if self._stopping:
                raise DeviceLostError("the workers have ended") from self.death
            job.queued_at = time.monotonic()
            self._scheduler.submit(job)
            if job.priority is Priority.INTERACTIVE:
                self._last_call = job.queued_at
            self._gathering = gather and job.lane.queued_tokens < job.lane.max_tokens
            if not self._gathering:
                self._call()
            return self._gathering

    def gathered(self) -> None:
        """Let workers take what was queued with ``gather``."""
        with self._lock:
            self._gathering = False
            self._call()

    def _call(self) -> None:
        for group in self._groups:
            if self._scheduler.has_work(group.only):
                group.call()

    def cancel(self, job: AnyJob, reason: str) -> None:
        """Drop what no worker has begun of ``job``; results of the rest are thrown away."""
        with self._lock:
            job.done = True
            dropped = self._scheduler.discard(job)
        if dropped:
            self._observer.dropped(job.lane, dropped, reason)

    def when_over(self, job: AnyJob, then: Callable[[], None]) -> None:
        """Call ``then`` once no batch has items of ``job``, which is done: now, or in a worker's thread."""
        with self._lock:
            if job.pending and job.running:
                job.on_over = then
                return
        then()

    def _wake_all(self) -> None:
        for group in self._groups:
            group.call_all()

    def _main(self, group: _WorkerGroup) -> None:
        try:
            if group.background:
                self._device.give_way()
            while (batch := self._next(group)) is not None:
                self._execute(batch)
        except BaseException as error:  # noqa: BLE001  (whatever ends this thread has to be told)
            self._die(error)

    def _next(self, group: _WorkerGroup) -> Batch | None:
        """Wait for work; None when it is time to end."""
        me = threading.current_thread()
        while True:
            with self._lock:
                self._running[me] = None
                while not self._stopping and (rest := self._rest(group)) != 0.0:
                    group.wait(rest)
                if self._stopping:
                    return None
                batch = self._scheduler.next_batch(time.monotonic(), group.count, only=group.only)
                expired = self._scheduler.take_expired()
                self._running[me] = batch
                more = self._scheduler.has_work(group.only)
                alone = not group.background and not more and group.idle == group.count - 1
                if more:
                    group.call()
            for job in expired:
                self._observer.dropped(job.lane, job.pending, "expired")
                self._fail(job, ExpiredError("the deadline passed in the queue"))
            if batch is not None:
                self._device.claim_cores(alone)
                return batch

    def _rest(self, group: _WorkerGroup) -> float | None:
        """Seconds that a thread of ``group`` has to wait: none, until work comes (None), or for calm."""
        if self._gathering or not self._scheduler.has_work(group.only):
            return None
        others_at_work = group.count - group.idle - 1
        if not group.background or group.count == 1 or others_at_work < group.count - 1:
            return 0.0
        return max(0.0, self._last_call + _CALM_SECONDS - time.monotonic())

    def _execute(self, batch: Batch) -> None:
        started = time.monotonic()
        for job, _ in batch.shares:
            if not job.started_at:
                job.started_at = started
        try:
            self._run(batch.lane, batch.shares)
        finally:
            self._left(batch)
        self._observer.ran(batch, time.monotonic() - started)

    def _left(self, batch: Batch) -> None:
        over: list[Callable[[], None]] = []
        with self._lock:
            for job, places in batch.shares:
                job.running -= len(places)
                if not job.running and job.on_over is not None:
                    over.append(job.on_over)
                    job.on_over = None
        for then in over:
            then()

    def _run(self, lane: AnyLane, shares: Sequence[Share]) -> None:
        """Run ``shares`` and, where that fails, each half of their items, until the guilty ones are alone."""
        live = [share for share in shares if not share.job.done]
        if not live:
            return
        error = self._attempt(lane, live)
        if error is None:
            return
        if self._device.lost(error):
            raise DeviceLostError("the device failed") from error
        out_of_memory = self._device.out_of_memory(error)
        items = sum(len(places) for _, places in live)
        if items == 1:
            if out_of_memory:
                error = ItemTooLargeError("out of memory with a single item").with_traceback(None)
            self._fail(live[0].job, error)
            return
        _log.warning("batch of %d items for %s failed, trying halves: %r", items, lane.name, error)
        self._observer.split(lane, out_of_memory)
        del error
        for half in _cut(live, (items + 1) // 2):
            self._run(lane, half)

    def _attempt(self, lane: AnyLane, shares: Sequence[Share]) -> Exception | None:
        payloads = [job.payloads[place] for job, places in shares for place in places]
        try:
            results = lane.run(payloads)
            if len(results) != len(payloads):
                raise RuntimeError(f"{lane.name} gave {len(results)} results for {len(payloads)} items")
        except Exception as error:  # noqa: BLE001  (a model may raise anything; the caller decides)
            if len(payloads) > 1:
                error.__traceback__ = None  # its frames hold the tensors that may have filled the memory
            return error
        self._finish(shares, results)
        return None

    def _finish(self, shares: Sequence[Share], results: Sequence[object]) -> None:
        left = iter(results)
        for job, places in shares:
            # The worker that runs an item is the only one to write its result.
            for place in places:
                job.results[place] = next(left)
        finished: list[AnyJob] = []
        now = time.monotonic()
        with self._lock:
            for job, places in shares:
                job.pending -= len(places)
                if job.pending == 0 and not job.done:
                    job.done = True
                    job.finished_at = now
                    finished.append(job)
        if finished:
            self._deliver(finished)

    def _fail(self, job: AnyJob, error: BaseException) -> None:
        with self._lock:
            if job.done:
                return
            job.done = True
            job.error = error
            job.finished_at = time.monotonic()
            dropped = self._scheduler.discard(job)
        if dropped:
            self._observer.dropped(job.lane, dropped, "failed")
        self._deliver([job])

    def _die(self, error: BaseException) -> None:
        _log.critical("device worker died", exc_info=error)
        with self._lock:
            first = self.death is None
            self.death = self.death or error
            self._stopping = True
            self._wake_all()
        try:
            self._fail_all()
        finally:
            if first:
                self._on_death(error)

    def _fail_all(self) -> None:
        """Fail what is queued and what this thread was running."""
        with self._lock:
            batch = self._running[threading.current_thread()]
            jobs = self._scheduler.drain() + [job for job, _ in (batch.shares if batch else [])]
        for job in jobs:
            self._fail(job, DeviceLostError("the device worker died"))


def _cut(shares: Sequence[Share], first: int) -> tuple[list[Share], list[Share]]:
    """Return the ``first`` items of ``shares``, and the others."""
    before: list[Share] = []
    behind: list[Share] = []
    for job, places in shares:
        if first > 0:
            before.append(Share(job, places[:first]))
        if first < len(places):
            behind.append(Share(job, places[max(0, first) :]))
        first -= len(places)
    return before, behind

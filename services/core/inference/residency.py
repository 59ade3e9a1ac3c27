"""Which models of a process are in memory: one device, one budget, and calls that hold what they use.

One load runs at a time. For its room the models that nothing holds are unloaded, the least recently used
first. If those do not do, the least recently used of the others takes no more calls after a moment, and
leaves when it has finished those it has; its new calls wait until it is loaded again, behind those loads
that are waiting already. So no model is kept out by the traffic of others, and none leaves under a call.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

from services.core.call import Call
from services.core.catalog.weights import WeightsNotFound
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.memory import Budget, NotEnoughMemoryError
from services.core.inference.metrics import ResidencyMetrics
from services.core.inference.slots import AnySlot, Loaded
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.cuda.recording import free_cached

_log = logging.getLogger(__name__)

T = TypeVar("T")

UNUSABLE = (WeightsNotFound, CheckpointError, NotEnoughMemoryError, ValueError)
"""Why a model cannot be loaded, in words for the operator."""

_GIB = 1 << 30

_RETRY_SECONDS = 5.0
"""After a load that failed, in which no other is tried that would push models out of memory."""

_MOMENT_SECONDS = 2.0
"""For how long models in use keep out another that needs their memory, in case one of them falls idle."""


class Residency:
    """The models of one process and the memory that they share. Used on one event loop.

    All are in memory from ``load_all`` on, or each from its first call on if that was not called. A model
    that nothing has used for ``idle_seconds`` is unloaded then, None never.
    """

    def __init__(self, device: torch.device, budget: Budget, *, idle_seconds: float | None = None) -> None:
        self._device = device
        self._budget = budget
        self._idle_seconds = idle_seconds
        self._loop = asyncio.get_running_loop()
        self._slots: list[AnySlot] = []
        self._metrics = ResidencyMetrics()
        self._wanted: deque[AnySlot] = deque()
        self._one_at_a_time = asyncio.Lock()
        self._stirred = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = False
        self._fixed = False
        self._closed = False

    def add(self, slot: AnySlot) -> None:
        """Take in a model that is not in memory."""
        self._slots.append(slot)
        self._metrics.left(slot.spec.id)

    async def load_all(self) -> None:
        """Load all models, to stay; raises one of UNUSABLE before the first one if they do not fit."""
        self._fixed = True
        sizes = {slot: await asyncio.to_thread(slot.weight_bytes) for slot in self._slots}
        self._budget.require({slot.spec.id: size for slot, size in sizes.items()})
        for slot, size in sizes.items():
            if self._budget.lacks(size):
                raise self._budget.shortage(slot.spec.id, size)
            began = time.monotonic()
            self._enter(slot, await asyncio.to_thread(slot.load), size, began)

    async def check_all(self) -> None:
        """Raise NotEnoughMemoryError for a model that alone is too large; warn of those not to be had."""
        for slot in self._slots:
            try:
                size = await asyncio.to_thread(slot.weight_bytes)
            except UNUSABLE as error:
                _log.warning("calls for %s will get 503 until it can be loaded: %s", slot.spec.id, error)
            else:
                self._budget.require({slot.spec.id: size})

    def close(self) -> None:
        """Load nothing more; who waits for a model is refused."""
        self._closed = True
        for slot in self._slots:
            slot.fail(_unavailable)
        for task in self._tasks:
            task.cancel()

    def drop(self) -> None:
        """Forget all models, whatever runs in them."""
        for slot in self._slots:
            if slot.resident:
                slot.empty()
                self._metrics.left(slot.spec.id)

    # What slots ask for

    async def obtain(self, slot: AnySlot, call: Call) -> None:
        """Hold ``slot`` for ``call``, after its model has been loaded; see ``Slot.held``."""
        began = time.monotonic()
        if self._closed:
            raise _unavailable()
        if began < slot.refuses_until:
            raise _unavailable(slot.refuses_until - began)
        waiter: asyncio.Future[ServiceError | None] = self._loop.create_future()
        slot.waiting.add(waiter)
        self._want(slot)
        timer = None
        if call.deadline is not None:
            timer = self._loop.call_later(call.deadline - began, _expire, waiter, call)
        try:
            error = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result() is None:
                slot.release()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            slot.waiting.discard(waiter)
            if not slot.waiting:
                self._stirred.set()
        call.timings.queue += time.monotonic() - began
        if error is not None:
            raise error

    def let_go(self, slot: AnySlot) -> None:
        """Note that nothing holds ``slot`` any more."""
        self._stirred.set()
        if self._idle_seconds is not None and not self._fixed:
            self._watch(slot, self._idle_seconds)

    # Loading, one at a time

    def _want(self, slot: AnySlot) -> None:
        if slot not in self._wanted:
            self._wanted.append(slot)
        if not self._working:
            self._working = True
            self._spawn(self._work())

    async def _work(self) -> None:
        """Bring the models that are wanted, in the order in which they were asked for."""
        try:
            while self._wanted:
                slot = self._wanted[0]
                async with self._one_at_a_time:
                    if slot.resident:
                        slot.offer()
                    else:
                        await self._bring(slot)
                # Nothing is awaited between the last look at who waits and this.
                self._wanted.popleft()
        finally:
            self._working = False

    async def _bring(self, slot: AnySlot) -> None:
        """Load a model for the calls that wait for it, if any still do then."""
        name = slot.spec.id
        harmful = False
        try:
            size = await _apart(slot.weight_bytes)
            self._budget.require({name: size})
            harmful = True
            if not await self._make_room(slot, size):
                return
            began = time.monotonic()
            self._enter(slot, await _apart(slot.load), size, began)
            return
        except UNUSABLE as error:
            _log.error("%s cannot be loaded: %s", name, error)
        except Exception:  # noqa: BLE001  (whatever it is, the other models go on)
            _log.exception("%s cannot be loaded", name)
        self._metrics.failed(name)
        if harmful:
            await _apart(partial(_give_back, self._device))
            slot.refuses_until = time.monotonic() + _RETRY_SECONDS
        slot.fail(_unavailable)

    def _enter(self, slot: AnySlot, loaded: Loaded[Any, Any], size: int, began: float) -> None:
        """Note that a model is in memory."""
        seconds = time.monotonic() - began
        self._budget.booked += size
        slot.fill(loaded, size)
        self._metrics.entered(slot.spec.id, size, seconds)
        _log.info(
            "%s is ready on %s after %.1f s, %.2f GiB; %s",
            *(slot.spec.id, self._device, seconds, size / _GIB, self._budget),
        )

    async def _make_room(self, slot: AnySlot, size: int) -> bool:
        """Unload what has to go for ``size`` bytes; False when nobody waits for ``slot`` any more."""
        patience = time.monotonic() + _MOMENT_SECONDS
        try:
            while slot.waiting:
                if not self._budget.lacks(size):
                    return True
                residents = [other for other in self._slots if other.resident]
                if not residents:
                    raise self._budget.shortage(slot.spec.id, size)
                if idle := [other for other in residents if not other.holds]:
                    await self._unload(_oldest(idle), f"for {slot.spec.id}")
                elif not await self._stirs(patience):
                    if offered := [other for other in residents if other.offered is not None]:
                        _oldest(offered).withdraw()
                    patience = time.monotonic() + _MOMENT_SECONDS
            return False
        finally:
            for other in self._slots:
                if other.resident and other.offered is None:
                    other.offer()

    async def _stirs(self, until: float) -> bool:
        """Wait until something may have fallen idle, or a call given up; False when it is too late."""
        self._stirred.clear()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._stirred.wait()
        except TimeoutError:
            return False
        return time.monotonic() < until

    # Unloading

    async def _unload(self, slot: AnySlot, why: str) -> None:
        """Take a model that nothing holds out of memory, all of it."""
        began = time.monotonic()
        slot.empty()
        await _apart(slot.passes.drain)
        await _apart(partial(_give_back, self._device))
        self._budget.booked -= slot.size
        self._metrics.left(slot.spec.id, unloaded=True)
        _log.info(
            "%s was unloaded %s in %.1f s, %.2f GiB; %s",
            *(slot.spec.id, why, time.monotonic() - began, slot.size / _GIB, self._budget),
        )

    def _watch(self, slot: AnySlot, seconds: float) -> None:
        """Look in a while whether nothing has used ``slot``; there is one such look ahead at a time."""
        if not slot.watched:
            slot.watched = True
            self._loop.call_later(seconds, self._look_at, slot)

    def _look_at(self, slot: AnySlot) -> None:
        slot.watched = False
        if slot.resident and not slot.holds and not self._closed:
            if (left := self._idle_time_left(slot)) > 0:
                self._watch(slot, left)
            else:
                self._spawn(self._unload_idle(slot))

    async def _unload_idle(self, slot: AnySlot) -> None:
        async with self._one_at_a_time:
            if slot.resident and not slot.holds and self._idle_time_left(slot) <= 0:
                await self._unload(slot, "as nothing used it")

    def _idle_time_left(self, slot: AnySlot) -> float:
        return slot.last_used + (self._idle_seconds or 0.0) - time.monotonic()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _oldest(slots: Iterable[AnySlot]) -> AnySlot:
    return min(slots, key=lambda slot: slot.last_used)


def _unavailable(seconds: float = _RETRY_SECONDS) -> ServiceError:
    return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=max(1.0, seconds))


def _expire(waiter: asyncio.Future[ServiceError | None], call: Call) -> None:
    if not waiter.done():
        allowed = (call.deadline or 0.0) - call.started
        waiter.set_result(ServiceError(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=round(allowed, 3)))


async def _apart(work: Callable[[], T]) -> T:
    """Run what takes long in a thread of its own, which no end of the process waits for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  (a result where there is no error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001  (whoever waits has to be told)
            error = caught
        try:
            loop.call_soon_threadsafe(tell, result, error)
        except RuntimeError:
            if not loop.is_closed():
                raise

    threading.Thread(target=run, name="residency", daemon=True).start()
    return await done


def _give_back(device: torch.device) -> None:
    """Return memory that nothing uses any more to the device and the system."""
    gc.collect()
    if device.type == "cuda":
        free_cached()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

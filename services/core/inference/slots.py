"""The places of models in a process: what calls hold on to while they use one, and passes through it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.jobs import Lane
from services.core.modeling.types import EncodeItem

C = TypeVar("C")
R = TypeVar("R")


class UnloadedError(Exception):
    """The network is not in memory; only work that nobody waits for any more meets this."""


class ModelHandle(Generic[R]):
    """What a lane runs: the network while it is in memory. Safe to use from several threads.

    Batches may outlive their calls, so the network is behind this and not in the lane itself: a batch that is
    forgotten somewhere keeps no weights in memory.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._run: Callable[[Sequence[EncodeItem]], Sequence[R]] | None = None
        self._inside = 0

    def __call__(self, items: Sequence[EncodeItem]) -> Sequence[R]:
        """Run a batch. Raises UnloadedError, and what the network raises."""
        with self._changed:
            run = self._run
            if run is None:
                raise UnloadedError
            self._inside += 1
        try:
            return run(items)
        finally:
            del run
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def open(self, run: Callable[[Sequence[EncodeItem]], Sequence[R]]) -> None:
        """Let batches through to ``run``."""
        with self._changed:
            self._run = run

    def shut(self) -> None:
        """Forget the network, but for the batches that it is running."""
        with self._changed:
            self._run = None

    def drain(self) -> None:
        """Forget the network and wait for the batches that it is running."""
        with self._changed:
            self._run = None
            self._changed.wait_for(lambda: self._inside == 0)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[C, R]):
    """A network that is warm: ``run`` passes a batch through it, ``processor`` makes items for it."""

    run: Callable[[Sequence[EncodeItem]], Sequence[R]]
    processor: C


class ResidencyManager(Protocol):
    """Whoever decides what is in memory, as a slot sees it. Used on the event loop."""

    async def obtain(self, slot: AnySlot, call: Call) -> None:
        """Return when the model is in memory and held for ``call``; raises ServiceError."""
        ...

    def let_go(self, slot: AnySlot) -> None:
        """Called when nothing holds a model any more."""
        ...


class Slot(Generic[C, R]):
    """The place of one model of a process, whether or not it is in memory. Used on the event loop.

    ``weight_bytes`` tells what its weights will take and ``load`` brings it into memory; both block and
    run in another thread. ``offered`` is what the next call may take without asking: None while the model is
    not in memory, or about to leave it. ``waiting`` are calls that wait for it; each is woken up with None,
    then it holds the model, or with its error. ``holds`` counts those that use it; ``last_used`` is when the
    last of them ended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        lane: Lane[EncodeItem, R],
        passes: ModelHandle[R],
        residency: ResidencyManager,
        *,
        weight_bytes: Callable[[], int],
        load: Callable[[], Loaded[C, R]],
    ) -> None:
        self.spec = spec
        self.lane = lane
        self.weight_bytes = weight_bytes
        self.load = load
        self.passes = passes
        self.residency = residency
        self.offered: C | None = None
        self.processor: C | None = None
        self.size = 0
        self.holds = 0
        self.last_used = 0.0
        self.refuses_until = 0.0
        self.watched = False
        self.waiting: set[asyncio.Future[ServiceError | None]] = set()

    @property
    def resident(self) -> bool:
        """Whether the model is in memory."""
        return self.processor is not None

    def held(self, call: Call) -> Hold[C]:
        """Return a context in which ``call`` uses the model, which is loaded first where it has to be.

        Entering raises ServiceError: SERVICE_UNAVAILABLE with ``retry_after`` when it cannot be loaded,
        SERVICE_TIMEOUT at ``call.deadline``.
        """
        return Hold(self, call)

    def fill(self, loaded: Loaded[C, R], size: int) -> None:
        """Take in a model of ``size`` bytes and wake up who waits for it."""
        self.passes.open(loaded.run)
        self.processor = loaded.processor
        self.size = size
        self.last_used = time.monotonic()
        self.offer()

    def offer(self) -> None:
        """Let calls take the model again, first those that wait for it."""
        self.offered = self.processor
        for waiter in self.waiting:
            if not waiter.done():
                self.holds += 1
                waiter.set_result(None)
        self.waiting.clear()

    def withdraw(self) -> None:
        """Let further calls wait; those that hold the model are not disturbed."""
        self.offered = None

    def empty(self) -> None:
        """Forget the model, of which the passes under way keep what they need."""
        self.offered = self.processor = None
        self.passes.shut()

    def fail(self, error: Callable[[], ServiceError]) -> None:
        """Wake up who waits with an error."""
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(error())
        self.waiting.clear()

    def release(self) -> None:
        """Let go of one hold."""
        self.holds -= 1
        self.last_used = time.monotonic()
        if self.holds == 0:
            self.residency.let_go(self)


AnySlot: TypeAlias = Slot[Any, Any]


class Hold(Generic[C]):
    """A call's hold on a model; an asynchronous context manager that gives its processor."""

    __slots__ = ("_call", "_slot")

    def __init__(self, slot: Slot[C, Any], call: Call) -> None:
        self._slot = slot
        self._call = call

    async def __aenter__(self) -> C:
        slot = self._slot
        if slot.offered is not None:
            slot.holds += 1
        else:
            await slot.residency.obtain(slot, self._call)
        if slot.processor is None:
            slot.release()
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=1.0)  # the engine has stopped
        return slot.processor

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slot.release()

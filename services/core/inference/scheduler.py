"""What runs next: token-budget batches, fair between tenants and between calls, bounded.

A plain data structure: no thread, no clock, no model. Threads that share one hold a lock around every call.
Three rules decide the order:

* *Classes.* Interactive goes before batch, but batch work that waits earns ``batch_share`` of the tokens
  run meanwhile and goes first when it has earned its next item, so that it never starves. Where the device
  shares itself between the classes, each class has workers of its own and this rule is not needed.
* *Tenants* of a class share its tokens equally: start-time fair queueing, where each tenant's virtual time
  grows by what it was served and the one furthest behind is next. Who comes back from idling starts at the
  present, neither owed nor punished for it.
* *Jobs* of a tenant, one per call, have virtual deadlines: an item is due when its tenant has been served
  ``patience`` times the tokens of its own job up to and with it. So a call with thousands of texts does not
  hold up a short one that comes later, and can itself be overtaken for a bounded time only.

A batch is begun with the item that is next by these rules, and filled with others of its model and its kind:
of one task, where a network rests on one task at a time. Where few of that kind wait, others join them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

from services.core.call import Priority
from services.core.inference.jobs import AnyJob, AnyLane, Batch

_MISSES = 64
"""Jobs and tenants looked at in vain to fill one batch: beside what it takes, a cut has no more work than
this, however long the queue is."""

_FULL = 0.8
"""A batch filled to this part of its budget is not worth looking for more."""


class QueueFullError(Exception):
    """The queue holds its limit; ``excess_tokens`` have to go before it takes another job."""

    def __init__(self, excess_tokens: int) -> None:
        super().__init__(f"the queue is full, {excess_tokens} tokens have to go first")
        self.excess_tokens = excess_tokens


_Entry = tuple[float, int, AnyJob]
_Line = tuple[AnyLane, str]
"""Of the jobs of a tenant those of one model and kind."""


@dataclass(slots=True, eq=False)
class _Tenant:
    """A tenant with waiting items: its jobs as a heap by virtual deadline for each line, what it was served.

    ``sequence`` is the order in which tenants came.
    """

    name: str
    virtual: float
    sequence: int
    served: float = 0.0
    items: int = 0
    heaps: dict[_Line, list[_Entry]] = field(default_factory=dict[_Line, list[_Entry]])

    def lines_beside(self, lane: AnyLane, kind: str) -> list[_Line]:
        """Return the lines of the same lane and of other kinds."""
        return [line for line in self.heaps if line[0] is lane and line[1] != kind]


@dataclass(slots=True, eq=False)
class _Class:
    """The tenants of one priority. ``virtual`` is the present; ``idle`` has absent tenants ahead of it.

    ``turns`` is a heap of the active tenants, the one furthest behind first; those that have left are dropped
    when they come up.
    """

    virtual: float = 0.0
    active: dict[str, _Tenant] = field(default_factory=dict[str, _Tenant])
    idle: dict[str, float] = field(default_factory=dict[str, float])
    turns: list[tuple[float, int, _Tenant]] = field(default_factory=list[tuple[float, int, _Tenant]])
    sequence: int = 0
    idle_limit: int = 64

    def enter(self, name: str) -> _Tenant:
        """Return the tenant, making it active."""
        tenant = self.active.get(name)
        if tenant is None:
            self.sequence += 1
            tenant = _Tenant(name, max(self.virtual, self.idle.pop(name, 0.0)), self.sequence)
            self.active[name] = tenant
            if len(self.turns) > 2 * len(self.active) + 64:
                self.turns = [turn for turn in self.turns if self._here(turn[2])]
                heapq.heapify(self.turns)
            self.wait(tenant)
        return tenant

    def leave(self, tenant: _Tenant) -> None:
        """Take a tenant without items out; remember it while it is ahead of the present."""
        del self.active[tenant.name]
        if not self.active:
            self.virtual = 0.0
            self.idle.clear()
            self.turns.clear()
            return
        self.idle[tenant.name] = tenant.virtual
        if len(self.idle) > self.idle_limit:
            self.idle = {name: virtual for name, virtual in self.idle.items() if virtual > self.virtual}
            self.idle_limit = 2 * max(len(self.idle), len(self.active)) + 64

    def first(self) -> _Tenant | None:
        """Return the active tenant furthest behind."""
        while self.turns and not self._here(self.turns[0][2]):
            heapq.heappop(self.turns)
        return self.turns[0][2] if self.turns else None

    def take(self) -> _Tenant | None:
        """Return the active tenant furthest behind, which has no turn until ``wait`` gives it one."""
        tenant = self.first()
        if tenant is not None:
            heapq.heappop(self.turns)
        return tenant

    def wait(self, tenant: _Tenant) -> None:
        """Give a tenant its turn."""
        heapq.heappush(self.turns, (tenant.virtual, tenant.sequence, tenant))

    def _here(self, tenant: _Tenant) -> bool:
        return self.active.get(tenant.name) is tenant


class Scheduler:
    """The queue in front of one device.

    ``max_queue_tokens`` bounds what waits: callers ask ``check_room`` before they prepare a job. At the limit
    every job is refused, large or small; below it every job is taken whole, so the queue can pass its limit
    by one job. ``queued_tokens`` and ``queued_items`` count what no batch has taken yet.
    """

    def __init__(self, max_queue_tokens: int, *, batch_share: float = 1 / 16, patience: float = 4.0) -> None:
        self._limit = max_queue_tokens
        self._share = batch_share
        self._patience = patience
        self._classes = {priority: _Class() for priority in Priority}
        self._earned = 0.0
        self._sequence = count()
        self._entries = 0
        self._dead = 0
        self._expired: list[AnyJob] = []
        self.queued_tokens = 0
        self.queued_items = 0

    def submit(self, job: AnyJob) -> None:
        """Queue all items of ``job``."""
        tenant = self._classes[job.priority].enter(job.key_id)
        job.base = tenant.served
        job.sequence = next(self._sequence)
        self._push(tenant, job)
        self._count(job.lane, tenant, len(job.order), job.waiting_tokens)

    def check_room(self, promised_tokens: int = 0) -> None:
        """Raise QueueFullError at the limit; ``promised_tokens`` are on their way to the queue already."""
        excess = self.queued_tokens + promised_tokens - self._limit
        if excess >= 0:
            raise QueueFullError(excess + 1)

    def has_work(self, only: Priority | None = None) -> bool:
        """Whether items wait, of any class or of one."""
        return bool(self._classes[only].active) if only is not None else self.queued_items > 0

    def next_batch(self, now: float = 0.0, workers: int = 1, *, only: Priority | None = None) -> Batch | None:
        """Take the next batch for one of ``workers``, None if nothing waits.

        Workers take ``only`` one class where the device puts the classes in order by itself. Jobs found past
        their deadline at ``now`` leave the queue; ``take_expired`` has them.
        """
        while (priority := self._next_class(only)) is not None:
            batch = self._cut(priority, now, workers, background=only is Priority.BATCH)
            if batch is not None:
                return batch
        return None

    def take_expired(self) -> list[AnyJob]:
        """Return the jobs that expired since the last call."""
        expired, self._expired = self._expired, []
        return expired

    def discard(self, job: AnyJob) -> int:
        """Drop the items of ``job`` that still wait; returns how many. What runs already is not touched."""
        dropped = len(job.order)
        if dropped == 0:
            return 0
        tenant = self._classes[job.priority].active[job.key_id]
        self._withdraw(job, tenant)
        self._dead += 1
        if self._dead > 64 and self._dead * 2 > self._entries:
            self._compact()
        return dropped

    def drain(self) -> list[AnyJob]:
        """Empty the queue and return the jobs that had items waiting."""
        heaps = [heap for tenant in self._tenants() for heap in tenant.heaps.values()]
        jobs = [entry[2] for heap in heaps for entry in heap if entry[2].order]
        for job in jobs:
            self.discard(job)
        return jobs

    def _next_class(self, only: Priority | None) -> Priority | None:
        if only is not None:
            return only if self._classes[only].active else None
        interactive, batch = self._classes[Priority.INTERACTIVE], self._classes[Priority.BATCH]
        if not interactive.active:
            return Priority.BATCH if batch.active else None
        if not batch.active:
            self._earned = min(self._earned, 0.0)
            return Priority.INTERACTIVE
        return Priority.BATCH if self._earned >= self._next_cost(batch) else Priority.INTERACTIVE

    def _next_cost(self, cls: _Class) -> float:
        """Return the cost of the item that the class would run next."""
        tenant = cls.first()
        assert tenant is not None
        job = self._peek(tenant)
        assert job is not None
        return job.lengths[job.order[-1]] * job.lane.weight

    def _cut(self, priority: Priority, now: float, workers: int, *, background: bool) -> Batch | None:
        cls = self._classes[priority]
        batch: Batch | None = None
        budget: float = 0
        misses = 0
        had_turn: list[_Tenant] = []
        passed_over: list[tuple[_Tenant, AnyJob]] = []

        def enough() -> bool:
            return misses >= _MISSES or (batch is not None and batch.tokens >= _FULL * budget)

        def fill(tenant: _Tenant, line: _Line | None) -> None:
            """Take what the tenant has in ``line``; None is the line of the batch, which this may begin."""
            nonlocal batch, budget, misses
            while not enough() and (job := self._pop(tenant, line or _line(batch))) is not None:
                if job.deadline is not None and job.deadline <= now:
                    self._withdraw(job, tenant)
                    self._expired.append(job)
                    continue
                if batch is None:
                    batch = Batch(job.lane, job.kind)
                    budget = _budget(job.lane, workers, background)
                    cls.virtual = tenant.virtual
                self._serve(priority, batch, budget, tenant, job)
                if job.order:
                    passed_over.append((tenant, job))
                    misses += 1

        while not enough() and (tenant := cls.take()) is not None:
            had_turn.append(tenant)
            misses += batch is not None and _line(batch) not in tenant.heaps
            fill(tenant, None)
        if batch is not None:
            budget = min(budget, batch.lane.mixed_tokens)
            for tenant in had_turn:
                if enough():
                    break
                for line in tenant.lines_beside(batch.lane, batch.kind):
                    fill(tenant, line)
        for tenant, job in passed_over:
            self._push(tenant, job)
        for tenant in had_turn:
            if tenant.items:
                cls.wait(tenant)
            elif cls.active.get(tenant.name) is tenant:
                cls.leave(tenant)
        return batch

    def _peek(self, tenant: _Tenant) -> AnyJob | None:
        """Return the job of a tenant that is due first, None if none has items."""
        best: _Entry | None = None
        for line, heap in list(tenant.heaps.items()):
            while heap and not heap[0][2].order:
                heapq.heappop(heap)
                self._entries -= 1
                self._dead -= 1
            if not heap:
                del tenant.heaps[line]
            elif best is None or heap[0] < best:
                best = heap[0]
        return None if best is None else best[2]

    def _pop(self, tenant: _Tenant, line: _Line | None) -> AnyJob | None:
        """Take the job of a tenant that is due first out of its heap, of one line or of any."""
        if line is None:
            first = self._peek(tenant)
            if first is None:
                return None
            line = first.lane, first.kind
        heap = tenant.heaps.get(line)
        while heap:
            job = heapq.heappop(heap)[2]
            self._entries -= 1
            if job.order:
                return job
            self._dead -= 1
        tenant.heaps.pop(line, None)
        return None

    def _push(self, tenant: _Tenant, job: AnyJob) -> None:
        heapq.heappush(tenant.heaps.setdefault((job.lane, job.kind), []), self._entry(job))
        self._entries += 1

    def _serve(self, priority: Priority, batch: Batch, budget: float, tenant: _Tenant, job: AnyJob) -> None:
        items = len(job.order)
        tokens = batch.take(job, budget)
        if not tokens:
            return
        cost = tokens * job.lane.weight
        job.served += cost
        tenant.served += cost
        tenant.virtual += cost
        if priority is Priority.INTERACTIVE:
            self._earned += cost * self._share
        elif self._classes[Priority.INTERACTIVE].active:
            self._earned -= cost
        self._count(job.lane, tenant, len(job.order) - items, -tokens)

    def _entry(self, job: AnyJob) -> _Entry:
        """Return the job's place in its tenant's heap: when its next item is due."""
        next_cost = job.lengths[job.order[-1]] * job.lane.weight
        return job.base + self._patience * (job.served + next_cost), job.sequence, job

    def _withdraw(self, job: AnyJob, tenant: _Tenant) -> None:
        items, tokens = job.withdraw()
        self._count(job.lane, tenant, -items, -tokens)
        if tenant.items == 0:
            self._classes[job.priority].leave(tenant)

    def _count(self, lane: AnyLane, tenant: _Tenant, items: int, tokens: int) -> None:
        tenant.items += items
        lane.queued_items += items
        lane.queued_tokens += tokens
        self.queued_items += items
        self.queued_tokens += tokens

    def _tenants(self) -> list[_Tenant]:
        return [tenant for cls in self._classes.values() for tenant in cls.active.values()]

    def _compact(self) -> None:
        self._entries = 0
        for tenant in self._tenants():
            for line, heap in list(tenant.heaps.items()):
                tenant.heaps[line] = [entry for entry in heap if entry[2].order]
                heapq.heapify(tenant.heaps[line])
                self._entries += len(tenant.heaps[line])
        self._dead = 0


def _line(batch: Batch | None) -> _Line | None:
    return None if batch is None else (batch.lane, batch.kind)


def _budget(lane: AnyLane, workers: int, background: bool) -> int:
    most = max(lane.max_tokens, lane.background_tokens) if background else lane.max_tokens
    share = -(-lane.queued_tokens // workers)
    return min(most, max(lane.min_tokens, share))

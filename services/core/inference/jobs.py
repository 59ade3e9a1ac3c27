"""What the scheduler orders and the workers run: lanes, jobs and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from services.core.call import Priority

P = TypeVar("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Lane(Generic[P, R]):
    """What may share a batch: the items of one model, and how to run and cut them.

    ``run`` takes the payloads of a batch and returns as many results in the same order. A batch holds at
    most ``max_tokens`` (or one longer item). With several workers it is cut smaller, down to ``min_tokens``,
    so that all of them have work. Workers of the background, for whom nobody waits, may take
    ``background_tokens``. Its longest item is at most ``max_length_ratio`` times as long as its shortest.
    Items of several kinds, each of which would be a pass of its own in a larger batch, share one of at most
    ``mixed_tokens``. ``weight`` is the cost of one token relative to other lanes. ``pads`` says that ``run``
    pads items to the longest, which is only counted.
    """

    name: str
    run: Callable[[Sequence[P]], Sequence[R]]
    max_tokens: int = 16384
    min_tokens: int = 64
    background_tokens: int = 0
    max_length_ratio: float = float("inf")
    mixed_tokens: float = float("inf")
    weight: float = 1.0
    pads: bool = False
    queued_tokens: int = 0
    queued_items: int = 0


class Job(Generic[P, R]):
    """The items of one call. ``results`` has the order of ``payloads``; ``lengths`` are in tokens.

    ``kind`` says what the items have in common: those of one kind are best run together.
    ``deadline`` is on the clock whose readings ``Scheduler.next_batch`` is given, and so are ``queued_at``,
    ``started_at`` and ``finished_at``, which the workers fill in. ``done`` is set when no item may run any
    more; ``error`` then says why, unless all results are there or the caller gave up. ``on_done`` is called
    once, when results or error are there, by whoever delivers them. ``running`` items are in batches that
    have begun: of a job whose caller gave up they may outlive the call. ``on_over`` is called by the worker
    that runs the last of those.
    """

    __slots__ = (
        "base",
        "deadline",
        "done",
        "error",
        "finished_at",
        "key_id",
        "kind",
        "lane",
        "lengths",
        "on_done",
        "on_over",
        "order",
        "payloads",
        "pending",
        "priority",
        "queued_at",
        "results",
        "running",
        "sequence",
        "served",
        "started_at",
        "waiting_tokens",
    )

    def __init__(
        self,
        lane: Lane[P, R],
        payloads: Sequence[P],
        lengths: Sequence[int],
        *,
        kind: str = "",
        key_id: str = "anonymous",
        priority: Priority = Priority.INTERACTIVE,
        deadline: float | None = None,
        on_done: Callable[[Job[P, R]], None] | None = None,
    ) -> None:
        n = len(payloads)
        if n == 0 or len(lengths) != n or min(lengths) < 1:
            raise ValueError("a job needs payloads, each with a length of at least one token")
        self.lane = lane
        self.payloads = payloads
        self.lengths = lengths
        self.kind = kind
        self.key_id = key_id
        self.priority = priority
        self.deadline = deadline
        self.on_done = on_done
        self.results: list[R | None] = [None] * n
        self.pending = n
        self.running = 0
        self.on_over: Callable[[], None] | None = None
        self.done = False
        self.error: BaseException | None = None
        self.queued_at = self.started_at = self.finished_at = 0.0
        # The scheduler's: places still waiting, taken from the end, so the longest go first (they would
        # otherwise be left for one worker while the others idle) and equal ones in order of input.
        self.order: list[int] = sorted(range(n - 1, -1, -1), key=lengths.__getitem__)
        self.waiting_tokens = sum(lengths)
        self.sequence = 0
        self.base = 0.0
        self.served = 0.0

    def withdraw(self) -> tuple[int, int]:
        """Take out the items that still wait; returns how many they are, and their tokens."""
        items, tokens = len(self.order), self.waiting_tokens
        self.order.clear()
        self.waiting_tokens = 0
        return items, tokens


AnyLane: TypeAlias = Lane[Any, Any]
AnyJob: TypeAlias = Job[Any, Any]


class Share(NamedTuple):
    """What a batch has of one job: the ``places`` of its items in the job, in the order in which they run."""

    job: AnyJob
    places: list[int]


class Batch:
    """Items of one lane that run together, as the shares of their jobs; how many, and their token counts.

    It is begun for items of a ``kind``.
    """

    __slots__ = ("count", "kind", "lane", "longest", "shares", "shortest", "tokens")

    def __init__(self, lane: AnyLane, kind: str = "") -> None:
        self.lane = lane
        self.kind = kind
        self.shares: list[Share] = []
        self.count = self.tokens = 0
        self.shortest = self.longest = 0

    @property
    def items(self) -> list[tuple[AnyJob, int]]:
        """All items as (job, place in the job), in the order in which they run."""
        return [(job, place) for job, places in self.shares for place in places]

    def take(self, job: AnyJob, budget: float) -> int:
        """Move items from ``job``, which has some, into this batch while they fit; returns their tokens."""
        order, lengths = job.order, job.lengths
        count, tokens = len(order), job.waiting_tokens
        shortest, longest = lengths[order[0]], lengths[order[-1]]
        if not self._fits(tokens, shortest, longest, budget):
            count, tokens = self._fitting(job, budget)
            if count == 0:
                return 0
            shortest = lengths[order[-count]]
        self.shortest = min(self.shortest, shortest) if self.count else shortest
        self.longest = max(self.longest, longest)
        self.shares.append(Share(job, order[: -count - 1 : -1]))
        self.count += count
        self.tokens += tokens
        del order[-count:]
        job.waiting_tokens -= tokens
        job.running += count
        return tokens

    def _fits(self, tokens: int, shortest: int, longest: int, budget: float) -> bool:
        """Whether items of so many tokens together fit, the lengths of which lie within these bounds."""
        if self.count:
            shortest, longest = min(self.shortest, shortest), max(self.longest, longest)
        return self.tokens + tokens <= budget and longest <= self.lane.max_length_ratio * shortest

    def _fitting(self, job: AnyJob, budget: float) -> tuple[int, int]:
        """Return how many of the waiting items of ``job`` fit, and their tokens. The first of all does."""
        longest = job.lengths[job.order[-1]]
        count = tokens = 0
        for place in reversed(job.order):
            length = job.lengths[place]
            first = not self.count and not count
            if not first and not self._fits(tokens + length, length, longest, budget):
                break
            count += 1
            tokens += length
        return count, tokens

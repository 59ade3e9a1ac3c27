"""What every layer knows of the call it works for."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """Scheduling class; lower runs first, and the higher earns a share of what runs meanwhile."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(slots=True)
class Timings:
    """Where a call's time went, in seconds. Stages may overlap, so the sum can pass the total.

    ``fetch`` and ``decode`` are those of media, 0 where a call has none.
    """

    fetch: float = 0.0
    decode: float = 0.0
    tokenize: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


async def _free_of_charge(_tokens: int) -> None:
    return None


def _nothing_to_refund(_tokens: int) -> None:
    return None


@dataclass(slots=True)
class Call:
    """One call in flight.

    ``key_id`` is the id of the API key, never the key, or ``"anonymous"``; the scheduler is fair between
    them.
    ``deadline`` is on the ``time.monotonic`` clock. ``charge`` books billed tokens before inference and
    raises ``ServiceError`` (429 or 403) when the key has none left; ``refund`` gives some of them back for
    a part that failed on our side, such as a message of a stream. When a call as a whole fails so, what it
    was charged is given back but for ``answered``: a stream counts there the tokens of what it has sent.
    ``usage_tokens`` and ``model`` are filled in by the capability for metrics and logs, ``headers``
    (lower-case names) for a REST answer.
    """

    request_id: str
    key_id: str = "anonymous"
    tier: str = ""
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None
    charge: Callable[[int], Awaitable[None]] = _free_of_charge
    refund: Callable[[int], None] = _nothing_to_refund
    answered: int = 0
    timings: Timings = field(default_factory=Timings)
    model: str = ""
    usage_tokens: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


current_call: ContextVar[Call] = ContextVar("current_call")

"""What a limiter is, and how its refusals look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from services.core.access.principal import KeyLimits
from services.core.errors import ErrorCode, ServiceError

WINDOW_MS = 60_000
SLOT_MS = 100
"""Uses are counted by slots of a tenth of a second; a slot counts until its last moment is a minute old."""

NO_LIMIT = 2**31 - 1
"""What the headers say is left where nothing is limited: a number that every client can read."""

_CONCURRENCY_RETRY_SECONDS = 1.0


class LimitKind(IntEnum):
    """What a refusal was for; the numbers are those the scripts in Redis answer."""

    REQUESTS = 1
    TOKENS = 2
    CONCURRENCY = 3
    ADDRESS = 4


_CODES = {
    LimitKind.REQUESTS: ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED,
    LimitKind.TOKENS: ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED,
    LimitKind.CONCURRENCY: ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED,
    LimitKind.ADDRESS: ErrorCode.RATE_IP_LIMIT_EXCEEDED,
}


@dataclass(slots=True)
class Lease:
    """One admitted call: what its key has left, and what to give back.

    ``id`` names the concurrency slot in Redis; a lease of the in-process limiter has none.
    """

    key_id: str
    limits: KeyLimits
    remaining_requests: int
    remaining_tokens: int
    id: str | None = None


class Limiter(Protocol):
    """Admission by requests per minute, tokens per minute and concurrency, each all or nothing."""

    async def admit(self, key_id: str, limits: KeyLimits) -> Lease:
        """Count one request and take one slot, or raise a 429 and count nothing."""
        ...

    async def charge(self, lease: Lease, tokens: int) -> None:
        """Count tokens, or raise a 429 and count none."""
        ...

    async def release(self, lease: Lease) -> None:
        """Give the slot back."""
        ...

    async def count_address(self, address: str, limit: int) -> None:
        """Count one request of an address, or raise a 429."""
        ...


def remaining(limit: int | None, used: int) -> int:
    """Give what is left of a limit."""
    return NO_LIMIT if limit is None else max(0, limit - used)


def headers(remaining_requests: int, remaining_tokens: int) -> dict[str, str]:
    """Give the headers of every answer to a known caller."""
    return {
        "x-ratelimit-remaining-requests": str(remaining_requests),
        "x-ratelimit-remaining-tokens": str(remaining_tokens),
    }


def refusal(
    kind: LimitKind, *, current: int, limit: int, wait_ms: int, left: dict[str, str] | None = None
) -> ServiceError:
    """Build the 429 of one kind.

    ``current`` counts the refused use itself. ``wait_ms`` is when the same use would pass if nothing else
    is counted meanwhile; it becomes whole seconds, as the header wants. For a slot nobody can know:
    one second. A use greater than the whole limit never passes: it is told the window.
    """
    seconds = (
        _CONCURRENCY_RETRY_SECONDS if kind is LimitKind.CONCURRENCY else max(1, math.ceil(wait_ms / 1000))
    )
    return ServiceError(_CODES[kind], retry_after=float(seconds), headers=left, current=current, limit=limit)

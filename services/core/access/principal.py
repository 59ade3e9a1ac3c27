"""Whom a call is for, and what that caller may use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from services.core.settings import Tier


@dataclass(frozen=True, slots=True)
class Clock:
    """The two clocks access looks at, so that tests can turn them.

    ``wall`` dates keys, in seconds since the epoch; ``monotonic`` measures windows and ages.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of one key; ``None`` is none. Requests and tokens are per sliding minute."""

    requests: int | None
    tokens: int | None
    concurrency: int | None

    @classmethod
    def of(cls, tier: Tier) -> KeyLimits:
        """Take over a tier's figures."""
        return cls(tier.requests_per_minute, tier.tokens_per_minute, tier.concurrency)

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return not (self.requests is None and self.tokens is None and self.concurrency is None)


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    ``key_id`` is public and stands in logs, metrics and limits; the key itself is nowhere kept.
    ``expires_at`` is in wall seconds. ``metered`` says that tokens are taken from a balance.
    """

    key_id: str
    tier: str
    limits: KeyLimits
    name: str = ""
    expires_at: float | None = None
    metered: bool = False

"""How much a request may hold: one place for the numbers, which the gateway and every door read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from services.core.catalog.types import Capability, Modality, ModelSpec
from services.core.settings import Settings

MAX_STRING_BYTES = 12 << 20
"""Of one string in a body: a file of 8 MB in base64, or a text 90 times longer than any model reads. Longer
ones would be built in one go, and hold up everybody."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What bodies may hold: ``text`` and ``other`` bytes, by what a call may carry, and ``values``.

    ``together`` are the bytes of all bodies that one process reads and works on at a time.
    """

    text: int
    other: int
    values: int
    together: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read them from the settings."""
        return cls(
            text=min(settings.max_text_body_bytes, settings.max_body_bytes),
            other=settings.max_body_bytes,
            values=settings.max_body_values,
            together=max(settings.max_bodies_bytes, settings.max_body_bytes),
        )

    def body(self, capability: Capability | str, specs: Iterable[ModelSpec]) -> int:
        """Give the largest body in bytes of calls of a capability to models."""
        return largest_body(capability, specs, self.text, self.other)


def largest_body(capability: Capability | str, specs: Iterable[ModelSpec], text: int, other: int) -> int:
    """Give the largest body in bytes of calls of a capability to models: ``text``, or ``other`` if larger.

    Jobs carry many requests in one; other calls are as large as texts are, unless a model takes more.
    """
    if capability == Capability.BATCH:
        return other
    only_text = all(set(spec.modalities) <= {Modality.TEXT} for spec in specs)
    return min(text, other) if only_text else other

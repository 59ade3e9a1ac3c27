"""Texts of known token counts, and what one measurement yields."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Whole words of MiniLM's vocabulary, one token each, so that a text's length is known without a tokenizer.
_WORDS = (
    *("river", "stone", "light", "engine", "paper", "garden", "cloud", "music", "table", "winter"),
    *("copper", "island", "bridge", "window", "market", "road", "station", "summer", "forest", "letter"),
    *("doctor", "captain", "village", "hotel", "camera", "museum", "library", "mountain", "valley"),
)

SPECIALS = 2
WORKLOADS: dict[str, tuple[int, int]] = {
    "16": (16, 16),
    "128": (128, 128),
    "256": (256, 256),
    "8-256": (8, 256),
}
CONCURRENCIES = (1, 16, 64)
TEXTS_IN_ONE_CALL = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``calls`` is the number of calls in flight; ``texts`` the texts in each."""

    variant: str
    workload: str
    calls: int
    texts: int
    texts_per_second: float
    tokens_per_second: float
    p50_ms: float
    p95_ms: float


def texts_of(workload: str, count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """``count`` texts of a workload and their token counts, specials included."""
    low, high = WORKLOADS[workload]
    chance = random.Random(f"{workload}/{seed}")
    counts = [chance.randint(low, high) for _ in range(count)]
    return [" ".join(chance.choices(_WORDS, k=n - SPECIALS)) for n in counts], counts


def row(
    variant: str,
    workload: str,
    calls: int,
    texts: int,
    tokens: int,
    seconds: float,
    latencies: Sequence[float],
) -> Row:
    """Sum up a measurement of ``len(latencies)`` calls, all begun and ended within ``seconds``."""
    ordered = sorted(latencies)
    done = len(ordered) * texts
    return Row(
        variant,
        workload,
        calls,
        texts,
        texts_per_second=done / seconds,
        tokens_per_second=tokens / seconds,
        p50_ms=1e3 * ordered[len(ordered) // 2],
        p95_ms=1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
    )

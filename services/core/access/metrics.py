"""Figures of this room for /metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

REDIS_ERRORS = Counter("searchfoundation_redis_errors_total", "Commands to Redis that failed or timed out.")
REDIS_UP = Gauge("searchfoundation_redis_up", "1 while limits are kept in Redis, 0 while in process instead.")

_KEY_TOKENS = Counter("searchfoundation_key_tokens_total", "Tokens used, by id of the API key.", ["key_id"])
_MAX_KEYS = 1_000
_OTHER = "other"


class KeyUsage:
    """Counts tokens by key: a thousand keys by their own id, those seen later together as ``other``."""

    def __init__(self) -> None:
        self._children: dict[str, Counter] = {}

    def count(self, key_id: str, tokens: int) -> None:
        """Add tokens a key has used."""
        child = self._children.get(key_id)
        if child is None:
            if len(self._children) >= _MAX_KEYS:
                key_id = _OTHER
            child = self._children[key_id] = _KEY_TOKENS.labels(key_id)
        child.inc(tokens)

"""The form of API keys: making one, reading it off a header, and what is stored instead of it."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from services.core.errors import ErrorCode, ServiceError

_HEADER = re.compile(r"(?i:bearer) +(jina_[A-Za-z0-9_-]{60})")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key.

    Times are wall seconds. ``balance`` is the tokens granted in all, ``spent`` those used of them,
    counted only where there is a balance.
    """

    id: str
    digest: str
    name: str
    tier: str
    created_at: float
    balance: int | None = None
    spent: int = 0
    expires_at: float | None = None
    revoked_at: float | None = None

    def usable(self, now: float) -> bool:
        """Whether the key opens anything at wall time ``now``."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new_key() -> str:
    """Make a key of the hosted service's form: ``jina_``, 32 hex characters, 28 of URL-safe base64."""
    return f"jina_{secrets.token_hex(16)}{secrets.token_urlsafe(21)}"


def digest(key: str) -> bytes:
    """Give the SHA-256 of a key: what is stored and looked up.

    A key has 296 random bits, so neither salt nor a slow hash adds anything: there is no dictionary
    to try, and two keys are never alike. A plain digest can be indexed and costs half a microsecond.
    """
    return hashlib.sha256(key.encode()).digest()


def key_of(authorization: str | None) -> str:
    """Read the key off an ``Authorization`` value; raises one of the 401 codes.

    As RFC 7235 has it, the scheme's case does not matter.
    """
    if authorization is None or not authorization.strip():
        raise ServiceError(ErrorCode.AUTH_MISSING_API_KEY)
    match = _HEADER.fullmatch(authorization)
    if match is None:
        raise ServiceError(ErrorCode.AUTH_INVALID_FORMAT)
    return match[1]

"""What a key may have stored and unfinished at a time, by its tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Tier


@dataclass(frozen=True, slots=True)
class Holdings:
    """Unfinished jobs, their lines that are not done, webhooks not yet told, and bytes of files of a key."""

    jobs: int = 0
    lines: int = 0
    webhooks: int = 0
    stored_bytes: int = 0


_WORDS: Mapping[str, tuple[str, str]] = {
    "jobs": ("unfinished_jobs", "unfinished batch jobs"),
    "lines": ("unfinished_lines", "lines of unfinished batch jobs"),
    "webhooks": ("unfinished_webhooks", "webhooks not yet told"),
    "stored_bytes": ("stored_bytes", "stored bytes"),
}
"""Of each figure of a ``Holdings``: the field of a tier that limits it, and what an error calls it."""


def figures(used: Holdings, tier: Tier) -> dict[str, dict[str, int | None]]:
    """Give what is used and allowed of each quota, under the name of its setting; no limit is None."""
    return {
        setting: {"used": getattr(used, name), "limit": getattr(tier, setting)}
        for name, (setting, _) in _WORDS.items()
    }


def check(tier: Tier, used: Holdings, more: Holdings) -> None:
    """Raise ``ServiceError`` AUTHZ_RESOURCE_LIMIT_EXCEEDED when ``more`` is too much beside ``used``."""
    for name, (setting, words) in _WORDS.items():
        limit, have, asked = getattr(tier, setting), getattr(used, name), getattr(more, name)
        if limit is not None and asked and have + asked > limit:
            added = f" and {asked:,} more asked for" if asked > 1 else ""
            raise ServiceError(
                ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED,
                current=f"{have:,} {words}{added}",
                limit=f"{limit:,}",
            )

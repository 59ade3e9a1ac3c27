"""The capabilities of this distribution."""

from __future__ import annotations

from collections.abc import Mapping

from services.core.catalog.types import Capability

CAPABILITIES: Mapping[str, str] = {
    "embed": "services.embed.capability",
    "rerank": "services.rerank.capability",
    "classify": "services.classify.capability",
    "batch": "services.batch.capability",
    "chat": "services.chat.capability",
}
"""Capabilities by name, each a module with ``build(engine, catalog, settings)``; imported when named."""

STORING = frozenset({"classify", "batch"})
"""Those whose ``build`` takes the database of the process as a fourth argument."""


def implemented() -> tuple[Capability, ...]:
    """All of them, as the catalogue's type."""
    return tuple(map(Capability, CAPABILITIES))

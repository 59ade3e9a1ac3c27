"""The model of calls that cannot name one."""

from __future__ import annotations

from collections.abc import Iterable

from services.core.catalog.types import Capability, ModelSpec
from services.core.settings import Settings


def default_model(settings: Settings, served: Iterable[ModelSpec], capability: str) -> str:
    """Return ``SF_DEFAULT_MODEL``, else the first model that has the capability; else nothing."""
    if settings.default_model is not None:
        return settings.default_model
    return next((spec.id for spec in served if spec.supports(Capability(capability))), "")

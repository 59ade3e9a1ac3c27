"""Search Foundation: the models of the API, as services and in your own process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_foundation.library import Model, ModelError, load

__all__ = ["Model", "ModelError", "load"]


def __getattr__(name: str) -> Any:
    """Import the library when it is asked for: the commands start without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'search_foundation' has no attribute '{name}'")
    from search_foundation import library

    return getattr(library, name)

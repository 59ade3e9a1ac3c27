"""API keys, tiers, limits and usage."""

from services.core.access.control import AccessControl, Admission, Check
from services.core.access.principal import Principal

__all__ = ["AccessControl", "Admission", "Check", "Principal"]

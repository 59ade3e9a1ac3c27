"""Helpers for the request classes that capabilities make of catalogue entries."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BeforeValidator

from services.core.catalog.types import ModelSpec


def class_name(spec: ModelSpec, suffix: str) -> str:
    """Name the request class of a model: ``all-MiniLM-L6-v2`` gives ``AllMiniLML6V2<suffix>``."""
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", spec.id)) + suffix


def without_default(schema: dict[str, Any]) -> None:
    """Say nothing in the document rather than ``null`` where the default is the model's own."""
    del schema["default"]


def clean_url(text: str) -> str:
    """Take the blanks around a pasted URL away, and write its scheme, which has no case, in small letters."""
    scheme, separator, rest = text.strip().partition("://")
    return f"{scheme.lower()}{separator}{rest}"


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
"""JSON knows one kind of number: 256.0 is an integer there."""

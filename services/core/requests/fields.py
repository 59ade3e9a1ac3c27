"""Helpers for the request classes that capabilities make of catalogue entries."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

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


_is_digits = re.compile(r"-?[0-9]{1,18}").fullmatch
_FLAGS: dict[object, bool] = {
    **dict.fromkeys(("true", "True", "TRUE", "1"), True),
    **dict.fromkeys(("false", "False", "FALSE", "0"), False),
}


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and _is_digits(value) else value


def flag(value: object) -> object:
    """Return the boolean that some clients write otherwise; what is none as it came."""
    if isinstance(value, str):
        return _FLAGS.get(value, value)
    return value == 1 if type(value) is int and value in (0, 1) else value


def spellings(value: bool) -> list[object]:
    """Return all that ``flag`` takes for a boolean."""
    return [value, int(value), *(text for text, meant in _FLAGS.items() if meant is value)]


Whole = BeforeValidator(_whole)
"""JSON knows one kind of number: 256.0 is an integer there. Forms and low-code tools send "256"."""

Flag = Annotated[
    bool | None,
    BeforeValidator(flag, json_schema_input_type=bool | Literal[tuple(_FLAGS)] | Literal[0, 1] | None),
]
"""A boolean, or what some clients write for one: "true", "false", 1, 0."""

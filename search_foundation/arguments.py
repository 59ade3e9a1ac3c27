"""Types of arguments that several commands take; each raises ``ArgumentTypeError`` with a sentence."""

from __future__ import annotations

from argparse import ArgumentTypeError

_LAST_PORT = 65_535


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = _whole(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is less than 1")
    return value


def port(text: str) -> int:
    """A TCP port; 0 stands for a free one."""
    value = _whole(text)
    if not 0 <= value <= _LAST_PORT:
        raise ArgumentTypeError(f"{text} is no port: they go from 0 to {_LAST_PORT}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no whole number") from None

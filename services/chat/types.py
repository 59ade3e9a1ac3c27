"""A checked request for an answer, free of any wire format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no torch
    from services.core.inference.answering import AnswerOptions, Turn


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What to answer and how; already checked against what ``model`` takes.

    ``stream`` and ``include_usage`` concern the REST door alone.
    """

    model: str
    turns: tuple[Turn, ...]
    options: AnswerOptions
    stream: bool = False
    include_usage: bool = False

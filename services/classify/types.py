"""Requests and results of classification, free of any wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from services.core.content import Content

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]


class Access(StrEnum):
    """Who may classify with a classifier: every key that knows its id, or its owner only."""

    PUBLIC = "public"
    PRIVATE = "private"


@dataclass(frozen=True, slots=True)
class LabelGroup:
    """Labels that exclude each other; ``name`` is empty where a request has only one, unnamed group."""

    labels: tuple[str, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class ZeroShotRequest:
    """Contents to sort under labels. ``grouped`` says that the caller named groups, be it only one."""

    model: str
    contents: Sequence[Content]
    groups: tuple[LabelGroup, ...]
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class FewShotRequest:
    """Contents for a trained classifier."""

    classifier_id: str
    contents: Sequence[Content]


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """Examples for a new classifier: ``labels`` has one for each of ``contents``."""

    model: str
    contents: Sequence[Content]
    labels: Sequence[str]
    access: Access
    iterations: int


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """Further examples for a classifier; they may bring new labels."""

    classifier_id: str
    contents: Sequence[Content]
    labels: Sequence[str]
    iterations: int


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """``scores`` has one array (contents, labels) for each group, whose rows sum to 1.

    ``best`` holds the places (contents,) of the highest scores, the first of equal ones.
    """

    model: str
    groups: tuple[LabelGroup, ...]
    grouped: bool
    scores: list[Scores]
    best: list[list[int]]
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What was trained; ``samples`` counts the examples of this request."""

    classifier_id: str
    samples: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Classifier:
    """What is known of a classifier. Times are in seconds since the epoch.

    ``version`` counts trainings, the first one included; ``used_number`` calls that classified.
    """

    id: str
    owner: str
    model: str
    access: Access
    labels: tuple[str, ...]
    version: int
    used_number: int
    created_at: float
    updated_at: float
    used_at: float | None

    def open_to(self, caller: str) -> bool:
        """Whether ``caller`` may classify with it."""
        return self.access is Access.PUBLIC or self.owner == caller

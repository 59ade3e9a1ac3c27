"""What a model is given: contents as callers send them, and what networks read once those are opened.

A text is a ``str`` in either form, so a request of texts needs no wrapping. Every layer may import this; it
imports nothing but the catalogue's types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from services.core.call import Call
from services.core.catalog.types import Modality

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no numpy
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, sound, film or PDF as a caller sent it, neither fetched nor decoded.

    ``kind`` is the field it came in. ``source`` is the file itself (bytes), or a text that is an http or
    https URL, a ``data:`` URI, or the file in base64. ``mime_type`` is what the caller said of it, for
    errors only: the bytes decide.
    """

    kind: Modality
    source: str | bytes
    mime_type: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Contents that become one result together; their order matters."""

    parts: tuple[str | Media, ...]


Content: TypeAlias = str | Media | Group
"""One input of a request. A text, a picture, a group give one result each, a PDF one for each page."""


@dataclass(frozen=True, slots=True)
class Square:
    """A square of ``side`` pixels that a network wants of every picture, scaled by ``filter`` of Pillow.

    ``mode`` ``shortest`` scales the shorter side and cuts the middle out, ``longest`` scales the longer one
    and fills the rest with ``fill`` (0 to 255), ``squash`` scales each side by itself.
    """

    side: int
    mode: str = "shortest"
    filter: str = "bicubic"
    fill: int = 0


@dataclass(frozen=True, slots=True)
class Scaling:
    """Sides that are multiples of ``multiple``, an area from ``min_pixels`` to ``max_pixels``.

    Scaled by torch's bicubic filter on 8 bits, with antialiasing, as the fast processors of transformers do.
    """

    multiple: int
    min_pixels: int
    max_pixels: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a picture of this width and height gets.

        The sides are rounded to multiples, half to even; only where the area then lies outside the bounds
        both are scaled alike. A side is never less than ``multiple``.
        """
        unit = self.multiple
        w, h = round(width / unit) * unit, round(height / unit) * unit
        if w * h > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            w, h = (max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height))
        elif w * h < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            w, h = (math.ceil(side * grow / unit) * unit for side in (width, height))
        return w, h


Fit: TypeAlias = Square | Scaling
"""How a network wants pictures."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A decoded picture, or a page of a PDF: ``pixels`` (height, width, 3) uint8, RGB.

    ``source_size`` is its width and height before it was fitted.
    """

    pixels: NDArray[np.uint8]
    source_size: tuple[int, int]


Part: TypeAlias = str | Image
Input: TypeAlias = str | Image | tuple[Part, ...]
"""What one result is made of: a text, a picture, or several of them in order."""


class Usage(NamedTuple):
    """Tokens that are billed for an input, by modality; those of pictures by the catalogue's rules."""

    text: int = 0
    image: int = 0
    audio: int = 0
    video: int = 0

    @property
    def total(self) -> int:
        """Tokens of all modalities."""
        return sum(self)


class Opener(Protocol):
    """The media room, as the engine uses it: from what was sent to what networks read."""

    def open(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, call: Call
    ) -> AbstractAsyncContextManager[list[tuple[Image, ...]]]:
        """Fetch and decode media on behalf of ``call``, side by side; as many as there were, in order.

        A picture gives one image, a PDF one for each of its pages, each as ``fit`` wants it or else as it is.
        With each comes what errors call it, for example ``input 3``. All or nothing: raises ServiceError for
        the first that cannot be had, and then, as when it is cancelled, stops what it did for the others.
        The bytes count against the bound of all calls until the context ends.
        """
        ...

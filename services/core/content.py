"""What a model is given: contents as callers send them, and what networks read once those are opened.

A text is a ``str`` in either form, so a request of texts needs no wrapping. Every layer may import this; it
imports nothing but the catalogue's types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    Of a film ``frames`` are kept at most, evenly spread, whose areas together are from ``film_min_pixels`` to
    ``film_max_pixels``. Scaled by torch's bicubic filter on 8 bits, with antialiasing, as the fast processors
    of transformers do. ``copies`` says how many times as many bytes as the pixels the features have that the
    processor makes of them.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    frames: int = 0
    film_min_pixels: int = 0
    film_max_pixels: int = 0
    copies: int = 1

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a picture of this width and height gets.

        The sides are rounded to multiples, half to even; only where the area then lies outside the bounds
        both are scaled alike. A side is never less than ``multiple``.
        """
        unit = self.multiple
        area = round(width / unit) * unit * round(height / unit) * unit
        return self._bounded(width, height, area, 1, self.min_pixels, self.max_pixels)

    def frame_size(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that each of so many frames gets; frames count by pairs."""
        unit, frames = self.multiple, max(2, frames)
        if min(width, height) < unit:
            grow = max(unit / width, unit / height)
            width, height = int(width * grow), int(height * grow)
        area = round(frames / 2) * 2 * round(width / unit) * unit * round(height / unit) * unit
        return self._bounded(width, height, area, frames, self.film_min_pixels, self.film_max_pixels)

    def _bounded(
        self, width: int, height: int, area: int, frames: int, least: int, most: int
    ) -> tuple[int, int]:
        """Return the rounded sides unless their ``area`` is out of bounds."""
        unit, sides = self.multiple, (width, height)
        if area > most:
            shrink = math.sqrt(frames * width * height / most)
            w, h = (max(unit, math.floor(side / shrink / unit) * unit) for side in sides)
        elif area < least:
            grow = math.sqrt(least / (frames * width * height))
            w, h = (math.ceil(side * grow / unit) * unit for side in sides)
        else:
            w, h = (round(side / unit) * unit for side in sides)
        return w, h


Fit: TypeAlias = Square | Scaling
"""How a network wants pictures."""


SOUND_RATE = 16_000
"""Samples a second that networks hear."""

SOUND_SECONDS = 30
"""What networks hear of a sound; nothing behind that is decoded."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A decoded picture, or a page of a PDF: ``pixels`` (height, width, 3) uint8, RGB.

    ``source_size`` is its width and height before it was fitted.
    """

    pixels: NDArray[np.uint8]
    source_size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """The beginning of a decoded sound: ``samples`` (n,) fp32 from -1 to 1, mono, ``SOUND_RATE`` a second."""

    samples: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """A decoded film: ``frames`` (n, height, width, 3) uint8, RGB, evenly taken from all of it; its
    ``sound``.
    """

    frames: NDArray[np.uint8]
    sound: Sound | None = None


Opened: TypeAlias = Image | Sound | Film
Part: TypeAlias = str | Opened
Input: TypeAlias = str | Opened | tuple[Part, ...]
"""What one result is made of: a text, a picture, a sound, a film, or several of them in order."""


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

    @property
    def of_media(self) -> dict[str, int]:
        """Those of media, as answers name them; of what a call did not hold there is nothing."""
        return {f"{kind}_tokens": count for kind, count in self._asdict().items() if count and kind != "text"}


class Opening(Protocol):
    """The media of one call, opened; their bytes count against the bound of all calls until it ends."""

    def take(self) -> tuple[Opened, ...]:
        """Give what became of the next of the media, in their order, and forget it."""
        ...

    def became(self, size: int) -> None:
        """Count ``size`` bytes from now on for all that was taken: what a processor made of it."""
        ...

    def outlive(self) -> Callable[[], None]:
        """Count the bytes beyond the end of the context, until what is returned is called."""
        ...


class Opener(Protocol):
    """The media room, as the engine uses it: from what was sent to what networks read."""

    def open(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, call: Call
    ) -> AbstractAsyncContextManager[Opening]:
        """Fetch and decode media on behalf of ``call``, side by side; as many as there were, in order.

        A picture gives one image, a PDF one for each of its pages, each as ``fit`` wants it or else as it is;
        a sound and a film give one thing each.
        With each comes what errors call it, for example ``input 3``. All or nothing: raises ServiceError for
        the first that cannot be had, and then, as when it is cancelled, stops what it did for the others.
        Bytes count against the bound of all calls from before they come until the context ends. Of one call
        all media are opened together: who held some while it waits for room for others could wait for ever.
        Fills ``fetch``, ``decode`` and ``queue`` of ``call.timings``.
        """
        ...

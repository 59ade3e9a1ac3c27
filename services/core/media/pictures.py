"""From the bytes of a picture or PDF to pixels. Runs in the decoding processes only.

Imports nothing of ours, so that such a process starts fast and holds nothing but decoders.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Of some 40 that Pillow knows, among them one that starts Ghostscript."""

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_PDF_SCALE = 150 / 72
_PDF_PAGE_PIXELS = 20_000_000
_BROKEN = (OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError, IndexError, KeyError)
"""What decoders raise for files that are not as they should be; of others, the process dies."""

# The bound on pixels is ours and refuses; Pillow's own warns first.
Image.MAX_IMAGE_PIXELS = None
warnings.simplefilter("ignore")


class Refused(Exception):  # noqa: N818  (no error of the program's)
    """A file that is not decoded; the text is the end of a sentence for the caller."""


class Piece(NamedTuple):
    """What a decoding process answers with: what it is, and its bytes."""

    head: Mapping[str, Any]
    data: bytes


class Fit(NamedTuple):
    """See ``services.core.content.Square``."""

    side: int
    mode: str
    filter: str
    fill: int


def needs(pixels: int) -> Piece:
    """Ask for room for so many pixels; what follows is decoded when there is some."""
    return Piece({"needs": 3 * pixels}, b"")


class Rules(NamedTuple):
    """What to do with a file, and how much of it is done.

    ``max_pixels`` of one picture before it is fitted; ``max_pages_pixels`` of all pages together as they are
    given, 0 without a bound; ``max_aspect`` is that of the longer side to the shorter; ``upright`` turns a
    picture as its EXIF orientation says.
    """

    kind: str
    max_pixels: int
    max_pages_pixels: int
    max_aspect: int
    max_pages: int
    upright: bool
    fit: Fit | None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Rules:
        """Read the rules as they come from the server."""
        own = {name: fields[name] for name in cls._fields if name != "fit"}
        return cls(**own, fit=Fit(*fields["fit"]) if fields["fit"] else None)


def decode(data: bytes, rules: Rules) -> Iterator[Piece]:
    """Give the pixels of the picture that ``data`` is, or of each page of a PDF. Raises Refused."""
    if rules.kind == "pdf":
        yield from _pages(data, rules)
    else:
        image = _opened(data, rules)
        yield needs(image.width * image.height)
        yield _finished(_decoded(image, rules), rules)


def _opened(data: bytes, rules: Rules) -> Image.Image:
    """Read what a picture says of itself before its pixels."""
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except _BROKEN as error:
        raise Refused("it is not an image that can be read") from error
    _check_size(image.width, image.height, rules)
    return image


def _decoded(image: Image.Image, rules: Rules) -> Image.Image:
    try:
        if rules.upright:
            ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")
    except _BROKEN as error:
        raise Refused(_broken(image.format, error)) from error


def _broken(format: str | None, error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or "incomplete" in text or isinstance(error, EOFError):
        return f"its {format} data is truncated"
    return f"its {format} data is broken"


def _check_png(data: bytes) -> None:
    """Refuse a PNG whose end is missing: Pillow may give it with its last rows black."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at += length + 12
    raise Refused("its PNG data is truncated")


def _check_size(width: int, height: int, rules: Rules) -> None:
    if min(width, height) < 1:
        raise Refused("it has no pixels")
    if width * height > rules.max_pixels:
        raise Refused(f"it has {width:,} x {height:,} pixels, {rules.max_pixels:,} in all are allowed")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused(f"its sides of {width:,} and {height:,} differ by more than {rules.max_aspect} times")


def _finished(image: Image.Image, rules: Rules) -> Piece:
    """Return three bytes a pixel, by row, with the size of what they were made of."""
    source = image.size
    if rules.fit is not None:
        image = fitted(image, rules.fit)
    return Piece({"image": image.size, "source": source}, image.tobytes())


def fitted(image: Image.Image, fit: Fit) -> Image.Image:
    """Scale an RGB picture to ``fit.side`` pixels on both sides, as the published processors do."""
    side, filter = fit.side, _FILTERS[fit.filter]
    if fit.mode == "squash":
        return image.resize((side, side), filter)
    width, height = image.size
    if fit.mode == "longest":
        ratio = max(width, height) / side
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        if size != image.size:
            image = image.resize(size, filter)
        canvas = Image.new("RGB", (side, side), (fit.fill,) * 3)
        canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        return canvas
    shorter, longer = min(width, height), max(width, height)
    length = int(side * longer / shorter)
    size = (side, length) if width <= height else (length, side)
    if shorter != side:
        image = image.resize(size, filter)
    left, top = (round((length - side) / 2.0) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _pages(data: bytes, rules: Rules) -> Iterator[Piece]:
    try:
        import pypdfium2
    except ImportError as error:
        raise Refused(
            "PDFs are not read by this server; its operator can install 'search-foundation[media]'"
        ) from error
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        # The library's own code of the error may be that of an earlier file.
        if b"/Encrypt" in data:
            raise Refused("it is an encrypted PDF, which needs a password") from error
        raise Refused("it is not a PDF with pages that can be read") from error
    count = len(document)
    if count > rules.max_pages:
        raise Refused(f"it has {count:,} pages, {rules.max_pages:,} are allowed")
    sizes: list[tuple[float, float]] = []
    for number in range(count):
        try:
            sizes.append(document.get_page_size(number))
        except pypdfium2.PdfiumError as error:
            raise Refused(f"its page {number + 1} is broken") from error
    scales = [_page_scale(*size, number, rules) for number, size in enumerate(sizes)]
    largest = max((w * h * scale**2 for (w, h), scale in zip(sizes, scales, strict=True)), default=0.0)
    # While one page is taken over the next one is drawn.
    yield needs(min(2, count) * math.ceil(largest))
    total = 0
    for number, scale in enumerate(scales):
        try:
            page: Any = document[number]
            image = page.render(scale=scale, may_draw_forms=False).to_pil().convert("RGB")
        except pypdfium2.PdfiumError as error:
            raise Refused(f"its page {number + 1} is broken") from error
        page.close()
        total += image.width * image.height
        if 0 < rules.max_pages_pixels < total:
            raise Refused(f"its pages have more than {rules.max_pages_pixels:,} pixels together")
        yield _finished(image, rules)


def _page_scale(width: float, height: float, number: int, rules: Rules) -> float:
    """150 dpi, or as much as makes a giant page fit."""
    if not min(width, height) > 0:
        raise Refused(f"its page {number + 1} has no area")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused(f"the sides of its page {number + 1} differ by more than {rules.max_aspect} times")
    most = min(_PDF_PAGE_PIXELS, rules.max_pixels)
    return min(_PDF_SCALE, (most / (width * height)) ** 0.5 * 0.999)

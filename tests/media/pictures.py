"""Pictures and PDFs of all kinds, made here, and what is said of those that are refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pypdfium2
import sklearn
from PIL import Image, PngImagePlugin

PHOTOGRAPHS = Path(sklearn.__file__).parent / "datasets" / "images"


def photograph(name: str = "china.jpg") -> bytes:
    """A photograph of 640 x 427 that scikit-learn carries."""
    return (PHOTOGRAPHS / name).read_bytes()


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture that no format makes small, of any mode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def vast_png(width: int = 10_000, height: int = 10_000) -> bytes:
    """A PNG of 12 KB that unpacks to 100 megapixels of one bit each."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def oriented(orientation: int) -> bytes:
    """A JPEG that says in its EXIF how it is to be turned."""
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95)


def animated(format: str) -> bytes:
    frames = [noise(20, 10, seed) for seed in range(3)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:], duration=40)


def deep_grey() -> bytes:
    """A PNG of 16 bits: 0, 255, 256 and 65,535."""
    return saved(Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)))


def pdf(*sizes: tuple[float, float]) -> bytes:
    """A PDF of pages of these sizes, in points of 1/72 inch; a rectangle tells the first ones apart."""
    document = pypdfium2.PdfDocument.new()
    for number, (width, height) in enumerate(sizes):
        page = document.new_page(width, height)
        if number < 8:
            _draw(page, number)
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def _draw(page: pypdfium2.PdfPage, number: int) -> None:
    raw = pypdfium2.raw
    rectangle = raw.FPDFPageObj_CreateNewRect(20 + 30 * number, 20, 200, 300)
    raw.FPDFPageObj_SetFillColor(rectangle, 30 * number, 200 - 20 * number, 90, 255)
    raw.FPDFPath_SetDrawMode(rectangle, raw.FPDF_FILLMODE_ALTERNATE, False)
    raw.FPDFPage_InsertObject(page.raw, rectangle)
    raw.FPDFPage_GenerateContent(page.raw)


A4 = (595.0, 842.0)


def encrypted_pdf() -> bytes:
    """A PDF whose security handler wants a password; written by hand, since nothing here encrypts."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]>>",
        b"<</Filter/Standard/V 1/R 2/Length 40/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>",
    ]
    trailer = b"/Root 1 0 R/Encrypt 4 0 R/ID[<" + b"43" * 16 + b"><" + b"43" * 16 + b">]"
    return written_pdf(objects, trailer)


def pdf_without_pages() -> bytes:
    return written_pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"], b"/Root 1 0 R")


def written_pdf(objects: list[bytes], trailer: bytes) -> bytes:
    file, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(file))
        file += b"%d 0 obj" % number + content + b"endobj\n"
    start = len(file)
    file += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    file += b"".join(b"%010d 00000 n \n" % place for place in places)
    size = b"/Size %d" % (len(objects) + 1)
    return file + b"trailer<<" + size + trailer + b">>\nstartxref\n%d\n%%%%EOF" % start


class Bad(NamedTuple):
    """A file, the field that it comes in, and words of what is said of it."""

    make: Callable[[], bytes]
    says: str
    field: str = "image"


BAD: dict[str, Bad] = {
    "empty": Bad(lambda: b"", "it is empty"),
    "100 megapixels in 12 KB": Bad(vast_png, "it has 10,000 x 10,000 pixels"),
    "30,000 x 1": Bad(lambda: saved(noise(30_000, 1)), "differ by more than 200 times"),
    "truncated PNG": Bad(lambda: saved(noise(300, 300))[:-5000], "PNG data is truncated"),
    "truncated JPEG": Bad(lambda: photograph()[:-9000], "JPEG data is truncated"),
    "broken PNG": Bad(lambda: saved(noise(30, 30)).replace(b"IDAT", b"IDAT\0\0"), "PNG data is"),
    "SVG": Bad(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read"),
    "HEIC": Bad(lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read"),
    "PostScript": Bad(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript is not read"),
    "HTML": Bad(lambda: b"<!DOCTYPE html><html><body>404</body></html>", "it is an HTML page, not an image"),
    "text": Bad(lambda: b"hello world", "it is plain text, not an image"),
    "nothing known": Bad(lambda: b"\0\1\2\3" * 20, "its format is not known, not an image"),
    "sound": Bad(lambda: b"RIFF\x24\0\0\0WAVEfmt ", "it is WAV, not an image"),
    "PDF as an image": Bad(lambda: pdf(A4), "it is a PDF, not an image"),
    "image as a PDF": Bad(photograph, "it is JPEG, not a PDF", "pdf"),
    "malformed PDF": Bad(
        lambda: b"%PDF-1.7\nnothing of the kind", "not a PDF with pages that can be read", "pdf"
    ),
    "PDF without pages": Bad(pdf_without_pages, "not a PDF with pages that can be read", "pdf"),
    "5,000 pages": Bad(lambda: pdf(*[(72.0, 72.0)] * 5000), "it has 5,000 pages, 64 are allowed", "pdf"),
    "encrypted PDF": Bad(encrypted_pdf, "it is an encrypted PDF", "pdf"),
    "page of 100 m by 1 cm": Bad(lambda: pdf((283_465.0, 28.0)), "the sides of its page 1", "pdf"),
}
"""What no caller should send; every one of them is a 400 that names the input."""


def png_comment(text: str) -> bytes:
    """A small PNG that carries text beside its pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", text, zip=True)
    return saved(noise(8, 8), pnginfo=info)

"""What a file is, told by its first bytes and not by its name or what its sender says."""

from __future__ import annotations

from typing import NamedTuple

_HEAD = 4096


class Found(NamedTuple):
    """``kind`` is image, pdf, audio, video, text or unknown; ``name`` is the format as a caller knows it."""

    kind: str
    name: str


UNKNOWN = Found("unknown", "an unknown format")

_STARTS: tuple[tuple[bytes, Found], ...] = (
    (b"\xff\xd8\xff", Found("image", "JPEG")),
    (b"\x89PNG\r\n\x1a\n", Found("image", "PNG")),
    (b"GIF87a", Found("image", "GIF")),
    (b"GIF89a", Found("image", "GIF")),
    (b"BM", Found("image", "BMP")),
    (b"II*\0", Found("image", "TIFF")),
    (b"MM\0*", Found("image", "TIFF")),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Found("image", "JPEG 2000")),
    (b"\xff\x0a", Found("image", "JPEG XL")),
    (b"\0\0\x01\0", Found("image", "ICO")),
    (b"8BPS", Found("image", "Photoshop")),
    (b"%!PS", Found("image", "PostScript")),
    (b"ID3", Found("audio", "MP3")),
    *((bytes([0xFF, second]), Found("audio", "MP3")) for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
    *((bytes([0xFF, second]), Found("audio", "AAC")) for second in (0xF0, 0xF1, 0xF8, 0xF9)),
    (b"fLaC", Found("audio", "FLAC")),
    (b"OggS", Found("audio", "Ogg")),
    (b".snd", Found("audio", "AU")),
    (b"#!AMR", Found("audio", "AMR")),
    (b"\0\0\x01\xba", Found("video", "MPEG program stream")),
    (b"\x1a\x45\xdf\xa3", Found("video", "Matroska or WebM")),
    (b"FLV", Found("video", "FLV")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Found("video", "Windows Media")),
)
CONTAINERS = {
    "MP3": "mp3",
    "AAC": "aac",
    "FLAC": "flac",
    "Ogg": "ogg",
    "AU": "au",
    "AIFF": "aiff",
    "WAV": "wav",
    "M4A": "mov",
    "MP4 or QuickTime": "mov",
    "Matroska or WebM": "matroska",
    "AVI": "avi",
    "FLV": "flv",
    "Windows Media": "asf",
    "MPEG transport stream": "mpegts",
    "MPEG program stream": "mpeg",
}
"""Formats of sounds and films that are read, with the one demuxer of FFmpeg that is given them."""

EITHER = frozenset(CONTAINERS) - {"MP3", "AAC", "FLAC", "AU", "AIFF", "WAV"}
"""Formats that hold a film, or nothing but sound."""

_RIFF = {
    b"WEBP": Found("image", "WebP"),
    b"WAVE": Found("audio", "WAV"),
    b"AVI ": Found("video", "AVI"),
}
_AVIF = frozenset({b"avif", b"avis"})
_HEIF = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"})
_TEXT_MARKS = (b"<!doctype html", b"<html", b"<head", b"<body")


def sniff(data: bytes) -> Found:
    """Tell what ``data`` is."""
    for start, found in _STARTS:
        if data.startswith(start):
            return found
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], UNKNOWN)
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return Found("audio", "AIFF")
    if data[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] in (b"\x47", b""):
        return Found("video", "MPEG transport stream")
    if data[4:8] in (b"moov", b"mdat", b"wide") or (data[4:8] == b"free" and b"mdat" in data[8:64]):
        return Found("video", "MP4 or QuickTime")
    if data[4:8] == b"ftyp":
        return _boxes(data)
    head = data[:_HEAD]
    if b"%PDF-" in head[:1024]:
        return Found("pdf", "a PDF")
    lowered = head.lower()
    if b"<svg" in lowered:
        return Found("image", "SVG")
    if any(mark in lowered for mark in _TEXT_MARKS):
        return Found("text", "an HTML page")
    if head and b"\0" not in head and head.isascii():
        return Found("text", "plain text")
    return UNKNOWN


def _boxes(data: bytes) -> Found:
    """Tell AVIF and HEIF from films; the brands that a file is compatible with count as its own does."""
    length = min(int.from_bytes(data[:4], "big"), _HEAD)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, length, 4))}
    if data[8:12] in _AVIF or (brands & _AVIF and data[8:12] in _HEIF):
        return Found("image", "AVIF")
    if data[8:12] in _HEIF:
        return Found("image", "HEIC")
    if data[8:12] in (b"M4A ", b"M4B "):
        return Found("audio", "M4A")
    return Found("video", "MP4 or QuickTime")

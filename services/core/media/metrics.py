"""Metrics of the media room."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

BYTES = Gauge(
    "searchfoundation_media_bytes_in_flight",
    "Bytes of media that calls hold: files, pixels, and what networks have not read of them yet.",
)
BYTES_LIMIT = Gauge(
    "searchfoundation_media_bytes_in_flight_limit", "Bytes of media that all calls may hold together."
)
FETCHES = Counter(
    "searchfoundation_media_fetches",
    "Media fetched from URLs, by outcome: ok, refused (the same URL will not do later either), failed "
    "(it may), cancelled.",
    ("outcome",),
)
DECODE_SECONDS = Histogram(
    "searchfoundation_media_decode_seconds",
    "Time from a file to its pixels or samples, with the wait for a process, by what the file was sent as.",
    ("kind",),
    buckets=_SECONDS,
)
DECODERS_RESTARTED = Counter(
    "searchfoundation_media_decoders_restarted",
    "Decoding processes that were started in the place of one that was lost or ended.",
)

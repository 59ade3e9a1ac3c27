"""Packed request bodies are unpacked, within the limit of a body. The Lua filter refuses other codings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Config = dict[str, Any]

_DECOMPRESSOR = "type.googleapis.com/envoy.extensions.filters.http.decompressor.v3.Decompressor"
_CHUNK = 64 << 10
# gzip packs at most 1032 to 1, and Envoy takes no more than a connection's buffer at a time. The other two
# pack without such a bound; Envoy itself gives up on what grows more than a hundredfold.
_LIBRARIES: Mapping[str, tuple[str, Config]] = {
    "gzip": ("gzip.decompressor.v3.Gzip", {"chunk_size": _CHUNK, "max_inflate_ratio": 1032}),
    "br": ("brotli.decompressor.v3.Brotli", {"chunk_size": _CHUNK}),
    "zstd": ("zstd.decompressor.v3.Zstd", {"chunk_size": _CHUNK}),
}

CODINGS = tuple(_LIBRARIES)
"""Content codings of request bodies that the gateway unpacks."""


def unpacking_filters() -> Iterator[Config]:
    """One filter for each coding; what follows them sees the body as it was before it was packed."""
    for coding, (library, config) in _LIBRARIES.items():
        kind = f"type.googleapis.com/envoy.extensions.compression.{library}"
        yield {
            "name": f"decompressor_{coding}",
            "typed_config": {
                "@type": _DECOMPRESSOR,
                "decompressor_library": {"name": coding, "typed_config": {"@type": kind, **config}},
                # Services pack nothing; nor are callers told that they may.
                "request_direction_config": {"advertise_accept_encoding": False},
                "response_direction_config": {"common_config": {"enabled": _never()}},
            },
        }


def _never() -> Config:
    return {"default_value": False, "runtime_key": "searchfoundation.unpack_answers"}

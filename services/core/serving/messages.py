"""Typed messages that several capabilities read and write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from numpy.typing import NDArray
from searchfoundation.v1 import common_pb2

from services.core.call import Timings
from services.core.catalog.types import Modality
from services.core.content import Media, Usage
from services.core.requests.content import BARE_IMAGE


def content_value(content: common_pb2.Content | common_pb2.ContentPart) -> str | dict[str, Any]:
    """Put an input where the REST side has it: a text, or an object with one field; of nothing an empty one.

    Media are what the REST side makes of them, and not what it reads: bytes are never written as base64.
    """
    kind = content.WhichOneof("kind")
    if kind is None:
        return {}
    if kind == "text":
        # A text by declaration, which a string is not that looks like an image.
        return {"text": content.text} if content.text.startswith(BARE_IMAGE) else content.text
    if kind == "group":
        return {"content": [content_value(part) for part in cast(common_pb2.Content, content).group.parts]}
    media: common_pb2.Media = getattr(content, kind)
    return {kind: Media(Modality(kind), media.url or media.data, media.mime_type)}


async def fill(field: Any, messages: Iterable[Message], *, at_once: int = 256) -> None:
    """Put messages into a repeated field, letting the event loop go between so many of them."""
    left = iter(messages)
    while part := list(islice(left, max(1, at_once))):
        field.extend(part)
        if len(part) == at_once:
            await asyncio.sleep(0)


def field_path(name: str, inside: Iterable[str | int]) -> str:
    """Write where a field of a message is, for example ``inputs[3].text``."""
    return name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inside)


def timings(measured: Timings) -> common_pb2.Timings:
    """Render the times of a call."""
    return common_pb2.Timings(
        tokenize=_duration(measured.tokenize),
        queue=_duration(measured.queue),
        inference=_duration(measured.inference),
        fetch=_duration(measured.fetch),
        decode=_duration(measured.decode),
    )


def usage(billed: Usage, output: int | None = None) -> common_pb2.Usage:
    """Render what a call consumed; ``output`` is what it produced, None for what is not counted."""
    total = billed.total
    return common_pb2.Usage(total_tokens=total, prompt_tokens=total, output_tokens=output, **billed.of_media)


def float_vectors(vectors: NDArray[np.float32]) -> list[common_pb2.DenseVector]:
    """Render (n, width) as n messages of VECTOR_ENCODING_FLOAT.

    Packed floats are already on the wire what they are in memory; parsing them takes a third of the time
    that filling the field from Python floats does.
    """
    header = _float_header(vectors.shape[1])
    return [
        common_pb2.DenseVector.FromString(header + row.tobytes()) for row in vectors.astype("<f4", copy=False)
    ]


@lru_cache(maxsize=64)
def _float_header(width: int) -> bytes:
    """Return the bytes of a FLOAT message up to its numbers, which come last."""
    message = common_pb2.DenseVector(
        encoding=common_pb2.VECTOR_ENCODING_FLOAT, dimensions=width, values=[0.0] * width
    )
    return message.SerializeToString()[: -4 * width]


def _duration(seconds: float) -> Duration:
    nanoseconds = round(seconds * 1e9)
    return Duration(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)

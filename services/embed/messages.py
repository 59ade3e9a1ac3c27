"""Typed protobuf messages from and to the plain types."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from google.protobuf.duration_pb2 import Duration
from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.call import Timings
from services.core.serving.vocabulary import task_name
from services.embed.encoding import FloatMatrix, byte_rows
from services.embed.inputs import Location
from services.embed.schemas import INPUT_NAMES
from services.embed.types import EmbedResult, Encoding

ENCODINGS = {
    common_pb2.VECTOR_ENCODING_UNSPECIFIED: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT32_BYTES: Encoding.BASE64,
    common_pb2.VECTOR_ENCODING_BINARY: Encoding.BINARY,
    common_pb2.VECTOR_ENCODING_UBINARY: Encoding.UBINARY,
}
_ENCODING_NUMBERS = {encoding: number for number, encoding in ENCODINGS.items() if number}


def request_fields(
    model: str, inputs: Iterable[common_pb2.Content], options: embed_pb2.EmbedOptions
) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    fields: dict[str, Any] = {
        "input": [_item(content) for content in inputs],
        "truncate": options.truncate,
    }
    if model:
        fields["model"] = model
    if options.task:
        fields["task"] = task_name(options.task)
    if options.HasField("dimensions"):
        fields["dimensions"] = options.dimensions
    if options.HasField("normalized"):
        fields["normalized"] = options.normalized
    if options.encodings:
        fields["embedding_type"] = [ENCODINGS.get(number, str(number)) for number in options.encodings]
    return fields


def unary_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedRequest``, for example ``inputs[3].text`` or ``options.dimensions``."""
    return _path(location, "inputs")


def stream_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedStreamRequest``, which has one input."""
    return _path((*location[:1], *location[2:]) if _is_input(location) else location, "input")


def embeddings(result: EmbedResult) -> list[embed_pb2.Embedding]:
    """Render one message per vector, with all encodings asked for."""
    first, *others = (dense_vectors(result.vectors, encoding) for encoding in result.encodings)
    return [
        embed_pb2.Embedding(index=index, dense=dense, alternatives=[column[index] for column in others])
        for index, dense in enumerate(first)
    ]


def dense_vectors(vectors: FloatMatrix, encoding: Encoding) -> list[common_pb2.DenseVector]:
    """Render (n, width) as n messages.

    Packed floats are already on the wire what they are in memory; parsing them takes a third of the time
    that filling the field from Python floats does.
    """
    width = vectors.shape[1]
    rows = byte_rows(vectors, encoding)
    if encoding is Encoding.FLOAT:
        header = _float_header(width)
        return [common_pb2.DenseVector.FromString(header + row) for row in rows]
    number = _ENCODING_NUMBERS[encoding]
    return [common_pb2.DenseVector(encoding=number, dimensions=width, data=row) for row in rows]


def timings(measured: Timings) -> common_pb2.Timings:
    """Render the times of a call."""
    return common_pb2.Timings(
        tokenize=_duration(measured.tokenize),
        queue=_duration(measured.queue),
        inference=_duration(measured.inference),
    )


def usage(total_tokens: int) -> common_pb2.Usage:
    """Render what a call consumed; an embedding has no tokens but those of its input."""
    return common_pb2.Usage(total_tokens=total_tokens, prompt_tokens=total_tokens)


def _item(content: common_pb2.Content) -> str | dict[str, Any]:
    kind = content.WhichOneof("kind")
    if kind == "text":
        return content.text
    return {} if kind is None else {kind: None}


def _is_input(location: Location) -> bool:
    return bool(location) and location[0] in INPUT_NAMES


def _path(location: Location, input_name: str) -> str:
    head, *rest = location or INPUT_NAMES[:1]
    names = {"model": "model", INPUT_NAMES[0]: input_name, "embedding_type": "options.encodings"}
    path = names.get(str(head), f"options.{head}")
    return path + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in rest)


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

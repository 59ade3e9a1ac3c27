"""Typed protobuf messages from and to the plain types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.catalog.types import InputType
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path, float_vectors
from services.core.serving.vocabulary import task_name
from services.embed.encoding import FloatMatrix, byte_rows
from services.embed.schemas import INPUT_NAMES
from services.embed.types import EmbedResult, Encoding, MultiVectorResult, Result, SparseResult

ENCODINGS = {
    common_pb2.VECTOR_ENCODING_UNSPECIFIED: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT: Encoding.FLOAT,
    common_pb2.VECTOR_ENCODING_FLOAT32_BYTES: Encoding.BASE64,
    common_pb2.VECTOR_ENCODING_BINARY: Encoding.BINARY,
    common_pb2.VECTOR_ENCODING_UBINARY: Encoding.UBINARY,
    common_pb2.VECTOR_ENCODING_INT8: Encoding.INT8,
    common_pb2.VECTOR_ENCODING_UINT8: Encoding.UINT8,
}
_ROLES = {
    int(common_pb2.INPUT_ROLE_QUERY): InputType.QUERY,
    int(common_pb2.INPUT_ROLE_DOCUMENT): InputType.DOCUMENT,
}
_OPTIONS = {"embedding_type": "options.encodings", "input_type": "options.role"}
"""Fields of the REST schema that have another name here."""

_ENCODING_NUMBERS = {encoding: number for number, encoding in ENCODINGS.items() if number}


def request_fields(
    model: str, inputs: Iterable[common_pb2.Content], options: embed_pb2.EmbedOptions
) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    fields: dict[str, Any] = {
        "input": [content_value(content) for content in inputs],
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
    if options.role:
        fields["input_type"] = str(_ROLES.get(options.role, options.role))
    if options.late_chunking:
        fields["late_chunking"] = True
    if options.return_multivector:
        fields["return_multivector"] = True
    if options.return_tokenized_input:
        fields["return_tokenized_input"] = True
    if options.encodings:
        fields["embedding_type"] = [ENCODINGS.get(number, str(number)) for number in options.encodings]
    return fields


def unary_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedRequest``, for example ``inputs[3].text`` or ``options.dimensions``."""
    return _path(location, "inputs")


def stream_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``EmbedStreamRequest``, which has one input."""
    return _path((*location[:1], *location[2:]) if _is_input(location) else location, "input")


def embeddings(result: Result) -> Iterable[embed_pb2.Embedding]:
    """Render one message per input, with all encodings asked for, as they are asked for."""
    if isinstance(result, EmbedResult):
        return _dense(result)
    if isinstance(result, MultiVectorResult):
        return (_multi_vector(result, index) for index in range(len(result.vectors)))
    return (
        embed_pb2.Embedding(
            index=index,
            sparse=common_pb2.SparseVector(tokens=vector.tokens, weights=vector.weights.tolist()),
        )
        for index, vector in enumerate(result.vectors)
    )


def _multi_vector(result: MultiVectorResult, index: int) -> embed_pb2.Embedding:
    tokens = None if result.tokens is None else result.tokens[index]
    first, *others = (
        common_pb2.MultiVector(vectors=dense_vectors(result.vectors[index], encoding), tokens=tokens)
        for encoding in result.encodings
    )
    return embed_pb2.Embedding(index=index, multi=first, multi_alternatives=others)


def _dense(result: EmbedResult) -> Iterable[embed_pb2.Embedding]:
    first, *others = (dense_vectors(result.vectors, encoding) for encoding in result.encodings)
    return (
        embed_pb2.Embedding(index=index, dense=dense, alternatives=[column[index] for column in others])
        for index, dense in enumerate(first)
    )


def dense_vectors(vectors: FloatMatrix, encoding: Encoding) -> list[common_pb2.DenseVector]:
    """Render (n, width) as n messages."""
    if encoding is Encoding.FLOAT:
        return float_vectors(vectors)
    width = vectors.shape[1]
    rows = byte_rows(vectors, encoding)
    number = _ENCODING_NUMBERS[encoding]
    return [common_pb2.DenseVector(encoding=number, dimensions=width, data=row) for row in rows]


def usage(result: Result) -> common_pb2.Usage:
    """Render what a call consumed; sparse vectors count their entries as output."""
    output = result.entries if isinstance(result, SparseResult) else None
    billed = result.usage
    return common_pb2.Usage(
        total_tokens=billed.total,
        prompt_tokens=billed.total,
        image_tokens=billed.image or None,
        audio_tokens=billed.audio or None,
        video_tokens=billed.video or None,
        output_tokens=output,
    )


def _is_input(location: Location) -> bool:
    return bool(location) and location[0] in INPUT_NAMES


def _path(location: Location, input_name: str) -> str:
    head, *rest = location or INPUT_NAMES[:1]
    names = {"model": "model", INPUT_NAMES[0]: input_name} | _OPTIONS
    return field_path(names.get(str(head), f"options.{head}"), rest)

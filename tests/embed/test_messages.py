"""Typed messages: every task and encoding has its number, and fields land where callers look for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.catalog import Catalog
from services.core.content import Usage
from services.core.errors import ServiceError
from services.embed import grpc as messages
from services.embed.parsing import RequestParser
from services.embed.types import EmbedResult, Encoding

CATALOG = Catalog.load()
MINILM = "all-MiniLM-L6-v2"
V3 = "jina-embeddings-v3"
PARSER = RequestParser(CATALOG, CATALOG.select([MINILM, V3]), max_items=8)
Decoder = Callable[[bytes], np.ndarray]
VECTORS = np.random.default_rng(3).standard_normal((2, 24)).astype(np.float32)


def text(value: str) -> common_pb2.Content:
    return common_pb2.Content(text=value)


def paths(model: str, *inputs: common_pb2.Content, **options: object) -> list[str]:
    fields = messages.request_fields(model, inputs, embed_pb2.EmbedOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as caught:
        PARSER.parse(fields, messages.unary_location)
    return [error.field for error in caught.value.field_errors]


def test_every_encoding_has_a_number() -> None:
    assert set(messages.ENCODINGS) == set(common_pb2.VectorEncoding.values())
    assert set(messages.ENCODINGS.values()) == {encoding.numbers for encoding in Encoding}


def test_options_reach_the_request() -> None:
    options = embed_pb2.EmbedOptions(
        task=common_pb2.TASK_RETRIEVAL_QUERY,
        dimensions=16,
        normalized=False,
        truncate=True,
        encodings=[common_pb2.VECTOR_ENCODING_BINARY, common_pb2.VECTOR_ENCODING_FLOAT32_BYTES],
    )
    fields = messages.request_fields(V3, [text("a"), text("")], options)
    request = PARSER.parse(fields, messages.unary_location)
    assert request.contents == ["a", ""]
    assert request.task == "retrieval.query"
    assert (request.dimensions, request.normalized) == (16, False)
    assert request.truncate is True
    assert request.encodings == (Encoding.BINARY, Encoding.BASE64)


def test_unset_options_are_the_defaults_of_rest() -> None:
    fields = messages.request_fields(V3, [text("a")], embed_pb2.EmbedOptions())
    typed = PARSER.parse(fields, messages.unary_location)
    assert typed == PARSER.parse({"model": V3, "input": ["a"]})


def test_paths_are_those_of_the_message() -> None:
    image = common_pb2.Content(image=common_pb2.Media(url="https://example.com/a.png"))
    assert paths("", text("a")) == ["model"]
    assert paths(MINILM) == ["inputs"]
    assert paths(MINILM, *[text("a")] * 9) == ["inputs"]
    assert paths(MINILM, text("a"), common_pb2.Content()) == ["inputs[1].text"]
    assert paths(MINILM, text("a"), image) == ["inputs[1]"]
    assert paths(MINILM, text("a"), dimensions=385) == ["options.dimensions"]
    assert paths(MINILM, text("a"), dimensions=0) == ["options.dimensions"]
    assert paths(V3, text("a"), task=common_pb2.TASK_CLUSTERING) == ["options.task"]
    assert paths(V3, text("a"), task=99) == ["options.task"]
    assert paths(MINILM, text("a"), encodings=[1, 99]) == ["options.encodings[1]"]


@pytest.mark.parametrize("location", [("input", 0), ("input", 0, "text"), ("input",), ()])
def test_a_stream_message_has_one_input(location: tuple[str | int, ...]) -> None:
    expected = "input.text" if location[-1:] == ("text",) else "input"
    assert messages.stream_location(MINILM, location) == expected


def test_float_vectors() -> None:
    for message, row in zip(messages.dense_vectors(VECTORS, Encoding.FLOAT), VECTORS, strict=True):
        expected = common_pb2.DenseVector(
            encoding=common_pb2.VECTOR_ENCODING_FLOAT, dimensions=24, values=row.tolist()
        )
        assert message == expected


def unpack_offset(data: bytes) -> np.ndarray:
    return np.unpackbits((np.frombuffer(data, np.int8).astype(int) + 128).astype(np.uint8))


@pytest.mark.parametrize(
    ("encoding", "decode", "expected"),
    [
        (Encoding.BASE64, lambda data: np.frombuffer(data, "<f4"), VECTORS),
        (Encoding.UBINARY, lambda data: np.unpackbits(np.frombuffer(data, np.uint8)), VECTORS > 0),
        (Encoding.BINARY, unpack_offset, VECTORS > 0),
    ],
)
def test_packed_vectors(
    encoding: Encoding, decode: Callable[[bytes], np.ndarray], expected: np.ndarray
) -> None:
    for message, row in zip(messages.dense_vectors(VECTORS, encoding), expected, strict=True):
        assert messages.ENCODINGS[message.encoding] is encoding
        assert message.dimensions == 24
        assert not message.values
        assert np.array_equal(decode(message.data), row)


def test_results_in_several_encodings() -> None:
    result = EmbedResult("m", VECTORS, (Encoding.UBINARY, Encoding.FLOAT), Usage(4))
    for index, message in enumerate(messages.embeddings(result)):
        assert message.index == index
        assert message.dense.encoding == common_pb2.VECTOR_ENCODING_UBINARY
        (other,) = message.alternatives
        assert np.array_equal(np.array(other.values, np.float32), VECTORS[index])

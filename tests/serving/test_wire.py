"""Messages are measured before they are parsed."""

from __future__ import annotations

import sys

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import StringValue
from searchfoundation.v1 import common_pb2, embed_pb2

from services.core.requests.limits import MAX_STRING_BYTES
from services.core.serving.wire import Measured, TooManyFieldsError, body_data, measure
from tests.serving.probe import failure, reason, running

REQUEST = embed_pb2.EmbedRequest.DESCRIPTOR


def test_fields_are_counted_inside_of_messages_and_of_packed_numbers() -> None:
    inputs = [common_pb2.Content(text="hello")] * 10
    request = embed_pb2.EmbedRequest(model="m", inputs=inputs)
    assert measure(request.SerializeToString(), REQUEST, 1 << 20).fields == 1 + 10 * 2
    request.options.encodings.extend([1] * 500)
    assert measure(request.SerializeToString(), REQUEST, 1 << 20).fields == 1 + 10 * 2 + 2 + 500
    with pytest.raises(TooManyFieldsError):
        measure(request.SerializeToString(), REQUEST, 100)


@pytest.mark.parametrize("raw", [b"\x12", b"\x12\x05a", b"\xff" * 20, b"\x0f"])
def test_what_is_no_message_is_told(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        measure(raw, REQUEST, 100)
    with pytest.raises(DecodeError):
        body_data(raw)


def test_the_data_of_a_body_is_found_without_a_copy() -> None:
    raw = HttpBody(content_type="text/plain", data=b"abc").SerializeToString()
    assert bytes(body_data(raw)) == b"abc"
    assert body_data(raw).obj is raw
    assert bytes(body_data(raw + HttpBody(data=b"last").SerializeToString())) == b"last"
    with pytest.raises(DecodeError):
        body_data(raw * 100)


def test_texts_are_measured_as_they_will_be_in_memory() -> None:
    texts = ["a" * 1000, "é" * 300, "語" * 200, "b" * 100 + "😀"]
    sizes = [sys.getsizeof(text) for text in texts]  # before each keeps its bytes as well
    request = embed_pb2.EmbedRequest(inputs=[common_pb2.Content(text=text) for text in texts])
    raw = request.SerializeToString()
    assert measure(raw, REQUEST, 100) == Measured(8, 1000, 4 * 101 - 104)
    for text, size in zip(texts, sizes, strict=True):
        alone = embed_pb2.EmbedRequest(inputs=[common_pb2.Content(text=text)])
        assert 0 <= size - measure(alone.SerializeToString(), REQUEST, 100).longest < 100


async def test_a_typed_text_that_takes_too_much_memory_is_refused() -> None:
    async with running() as house:
        method = house.channel.unary_unary("/probe.Probe/Unary")
        wide = StringValue(value="a" * (MAX_STRING_BYTES // 4) + "😀")
        error = await failure(method(wide.SerializeToString()))
        assert reason(error) == "VALIDATION_ERROR"
        assert house.probe.calls == []


async def test_a_typed_message_of_too_many_fields_is_refused_before_it_is_parsed() -> None:
    async with running(max_body_values=400_000) as house:
        method = house.channel.unary_unary("/probe.Probe/Unary")
        error = await failure(method(StringValue(value="x").SerializeToString() * 200_000))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason(error) == "VALIDATION_ERROR"
        assert house.probe.calls == []
        await method(StringValue(value="x" * 200_000).SerializeToString())

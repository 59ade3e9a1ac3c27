"""Messages that several services share."""

from __future__ import annotations

import numpy as np
import pytest
from searchfoundation.v1 import common_pb2

from services.core.call import Timings
from services.core.catalog.types import Modality
from services.core.content import Media
from services.core.serving import messages


def test_timings_keep_nanoseconds() -> None:
    rendered = messages.timings(Timings(0.5, 0.25, tokenize=0.000_000_5, queue=0.0, inference=2.25))
    assert rendered.fetch.ToNanoseconds() == 500_000_000
    assert rendered.decode.ToNanoseconds() == 250_000_000
    assert rendered.tokenize.ToNanoseconds() == 500
    assert rendered.queue.ToNanoseconds() == 0
    assert rendered.inference.ToNanoseconds() == 2_250_000_000


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 200)])
def test_float_vectors(shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    rendered = messages.float_vectors(vectors)
    assert [message.dimensions for message in rendered] == [shape[1]] * shape[0]
    assert {message.encoding for message in rendered} <= {common_pb2.VECTOR_ENCODING_FLOAT}
    assert np.array_equal(
        np.array([message.values for message in rendered], np.float32).reshape(shape), vectors
    )


def test_values_of_contents() -> None:
    image = common_pb2.Content(image=common_pb2.Media(url="https://example.com/a.png"))
    assert messages.content_value(common_pb2.Content(text="")) == ""
    assert messages.content_value(image) == {
        "image": Media(Modality.IMAGE, source="https://example.com/a.png", mime_type="")
    }
    assert messages.content_value(common_pb2.Content()) == {}


def test_paths() -> None:
    assert messages.field_path("inputs", (3, "text")) == "inputs[3].text"
    assert messages.field_path("model", ()) == "model"

"""Whatever JSON comes in: a request, or an error that can be told. And the document says which."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import ServiceError
from services.embed.types import EmbedRequest
from tests.described import JSON, TEXTS, must_be_tellable
from tests.embed.test_openapi import DESCRIBED, PARSER, SERVED

INPUT = TEXTS | st.lists(TEXTS | JSON, max_size=6) | JSON
ENCODING = st.sampled_from(["float", "base64", "binary", "ubinary", "int8"])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "dimensions": st.integers(-1, 1100) | JSON,
    "normalized": st.booleans() | JSON,
    "truncate": st.booleans() | JSON,
    "task": st.sampled_from(["retrieval.query", "clustering"]) | JSON,
    "embedding_type": ENCODING | st.lists(ENCODING, max_size=3) | JSON,
    "user": JSON,
    "input_type": st.sampled_from(["query", "search_document", "clustering", "image"]) | JSON,
    "prompt_name": st.sampled_from(["query", "passage", "separation", "summary"]) | JSON,
    "output_dtype": st.sampled_from(["float", "ubinary", "int4"]) | JSON,
}
ALIASES: tuple[str, ...] = (
    "texts", "content", "encoding_format", "encoding_type", "embedding_types", "task_type",
    "output_dimensionality", "output_dimension", "truncation",
)  # fmt: skip
OTHER_NAMES: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(ALIASES, JSON)
MODEL = st.sampled_from([spec.id for spec in SERVED]) | JSON


def outcome(body: dict[str, Any]) -> EmbedRequest | ServiceError:
    try:
        return PARSER.parse(body)
    except ServiceError as error:
        return error


@given(st.fixed_dictionaries({"model": MODEL}, optional={"input": INPUT} | OPTIONS | OTHER_NAMES) | JSON)
@settings(max_examples=200, deadline=None)
def test_every_refusal_can_be_told(body: Any) -> None:
    if not isinstance(body, dict):
        return  # the REST codec lets objects in only
    told = outcome(orjson.loads(orjson.dumps(body)))
    if isinstance(told, ServiceError):
        must_be_tellable(told)
    else:
        assert all(type(text) is str for text in told.contents)
        assert told.encodings


@given(st.fixed_dictionaries({"model": MODEL}, optional={"input": INPUT} | OPTIONS))
@settings(max_examples=200, deadline=None)
def test_the_document_tells_what_is_taken(body: dict[str, Any]) -> None:
    assert DESCRIBED.request.is_valid(body) is isinstance(outcome(body), EmbedRequest)

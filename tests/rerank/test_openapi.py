"""The served document on /v1/rerank: true to what is checked and answered."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.openapi import build_openapi
from services.core.catalog import Catalog
from services.core.catalog.types import Capability
from services.core.content import Usage
from services.core.errors import ServiceError
from services.core.openapi.parts import Bounds
from services.rerank.parsing import RequestParser
from services.rerank.rest import response_body, response_items
from services.rerank.types import RerankRequest, RerankResult
from tests.described import JSON, TEXTS, Described, must_be_tellable

CATALOG = Catalog.load()
MODELS = ["all-MiniLM-L6-v2", "jina-reranker-v2-base-multilingual", "jina-reranker-v3", "jina-reranker-m0"]
SERVED = CATALOG.select(MODELS)
PARSER = RequestParser(CATALOG, SERVED, max_documents=4)
DOCUMENT = build_openapi({Capability.RERANK: SERVED}, Bounds(documents=4))
DESCRIBED = Described(DOCUMENT, "/v1/rerank")
MINILM, V2, V3, M0 = MODELS


def outcome(body: dict[str, Any]) -> RerankRequest | ServiceError:
    try:
        return PARSER.parse(body)
    except ServiceError as error:
        return error


def test_only_what_is_served_is_described() -> None:
    assert "/v1/embeddings" not in DOCUMENT["paths"]
    assert "/v1/rerank" not in build_openapi({})["paths"]
    assert list(DESCRIBED.schema["discriminator"]["mapping"]) == MODELS
    both = build_openapi({Capability.EMBED: SERVED[:1], Capability.RERANK: SERVED[:1]})
    assert {"/v1/embeddings", "/v1/rerank"} <= both["paths"].keys()
    assert {"AllMiniLML6V2EmbeddingRequest", "AllMiniLML6V2RerankingRequest"} <= both["components"][
        "schemas"
    ].keys()


def test_fields_of_a_model() -> None:
    common = {"model", "query", "documents", "top_n", "return_documents", "truncation"}
    assert DESCRIBED.properties(V2).keys() == DESCRIBED.properties(M0).keys() == common
    listwise = DESCRIBED.properties(V3)
    assert listwise.keys() == common | {"max_doc_length", "return_embeddings"}
    assert listwise["max_doc_length"]["default"] == 2048
    assert listwise["max_doc_length"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 8192}
    assert DESCRIBED.properties(MINILM).keys() == listwise.keys()
    assert "default" not in listwise["top_n"]
    assert listwise["return_documents"]["default"] is True


FULL = {"model": MINILM, "query": "q", "documents": ["a"]}


@pytest.mark.parametrize(
    "body",
    [
        FULL,
        {**FULL, "query": {"text": "q"}},
        {**FULL, "query": ["q"]},
        {**FULL, "query": {"image": "x"}},
        {**FULL, "documents": ["a", {"text": "b", "id": 1}]},
        {**FULL, "documents": []},
        {**FULL, "documents": ["a"] * 5},
        {**FULL, "documents": "a"},
        {**FULL, "documents": [{"image": "x"}]},
        {**FULL, "model": M0, "documents": [{"image": "x"}], "query": {"image": "y"}},
        {**FULL, "model": M0, "documents": [{"image": ""}]},
        {**FULL, "model": M0, "documents": [{"image": 5}]},
        {**FULL, "top_n": 0},
        {**FULL, "top_n": 2.0},
        {**FULL, "top_n": None},
        {**FULL, "truncation": None, "return_documents": None, "return_embeddings": None},
        {**FULL, "max_doc_length": 512},
        {**FULL, "max_doc_length": 513},
        {**FULL, "model": V2, "max_doc_length": "x"},
        {"model": MINILM, "query": "q"},
        {"model": MINILM, "documents": ["a"]},
        {**FULL, "model": "jina-embeddings-v3"},
    ],
)
def test_what_the_document_allows_is_what_is_taken(body: dict[str, Any]) -> None:
    assert DESCRIBED.request.is_valid(body) is isinstance(outcome(body), RerankRequest)


@pytest.mark.parametrize("embeddings", [None, np.ones((2, 4), np.float32)])
@pytest.mark.parametrize("documents", [None, ["a", {"text": "b", "n": [1]}], [{"image": "x", "id": 1}, "c"]])
def test_answers_are_as_described(embeddings: Any, documents: Any) -> None:
    result = RerankResult(MINILM, [1, 0], [0.5, -0.25], embeddings, Usage(7, image=2))
    body = response_body(result, response_items(result, documents, 0, 2))
    answer = orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
    DESCRIBED.component("RerankingResponse").validate(answer)
    assert ("document" in answer["results"][0]) is (documents is not None)
    assert ("embedding" in answer["results"][0]) is (embeddings is not None)


def test_statuses() -> None:
    assert {"200", "400", "401", "403", "422", "429", "503", "504"} <= DESCRIBED.operation["responses"].keys()


ITEMS = TEXTS | st.fixed_dictionaries({"image": st.text(max_size=5) | JSON})
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "top_n": st.integers(-1, 5) | JSON,
    "return_documents": st.booleans() | JSON,
    "truncation": st.booleans() | JSON,
    "max_doc_length": st.integers(-1, 9000) | JSON,
    "return_embeddings": st.booleans() | JSON,
    "user": JSON,
}
INPUTS = {"query": ITEMS | JSON, "documents": st.lists(ITEMS | JSON, max_size=6) | JSON}
OTHER_NAMES = dict.fromkeys(("top_k", "max_tokens_per_doc", "truncate"), JSON)
NAMES = st.sampled_from(MODELS) | JSON


@given(st.fixed_dictionaries({"model": NAMES}, optional=INPUTS | OPTIONS | OTHER_NAMES))
@settings(max_examples=60, deadline=None)
def test_every_refusal_can_be_told(body: dict[str, Any]) -> None:
    told = outcome(orjson.loads(orjson.dumps(body)))
    if isinstance(told, ServiceError):
        must_be_tellable(told)
    else:
        assert told.documents


@given(st.fixed_dictionaries({"model": NAMES, **INPUTS}, optional=OPTIONS))
@settings(max_examples=60, deadline=None)
def test_the_document_tells_what_is_taken(body: dict[str, Any]) -> None:
    assert DESCRIBED.request.is_valid(body) is isinstance(outcome(body), RerankRequest)

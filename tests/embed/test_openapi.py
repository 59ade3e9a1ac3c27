"""The served document: valid, complete, and true to what is checked and answered."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from gateway.openapi import build_openapi
from services.core.catalog import Catalog, model_info, models_list
from services.core.catalog.types import Capability
from services.core.content import Usage
from services.core.errors import ErrorCode, ServiceError
from services.core.openapi.parts import Bounds
from services.core.serving.failure import http_body
from services.embed.parsing import RequestParser
from services.embed.rest import response_body, response_items
from services.embed.types import EmbedResult, Encoding
from tests.described import Described

CATALOG = Catalog.load()
SERVED = CATALOG.select(
    ["all-MiniLM-L6-v2", "jina-embeddings-v2-base-en", "jina-embeddings-v3", "jina-colbert-v2"]
)
PARSER = RequestParser(CATALOG, SERVED, max_items=4)
DOCUMENT = build_openapi({Capability.EMBED: SERVED}, Bounds(items=4))
DESCRIBED = Described(DOCUMENT, "/v1/embeddings")
VECTORS = np.random.default_rng(5).standard_normal((2, 16)).astype(np.float32)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set[str]()
        return own.union(*map(references, value.values()))
    return set[str]().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    names = {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)}
    assert names
    assert names <= schemas.keys()
    assert set(schemas) - names == set(), "schemas that nothing refers to"


def test_it_is_json() -> None:
    assert orjson.loads(orjson.dumps(DOCUMENT)) == DOCUMENT
    assert DOCUMENT["openapi"].startswith("3.1")


def test_each_served_model_has_its_schema() -> None:
    mapping = DESCRIBED.schema["discriminator"]["mapping"]
    assert list(mapping) == [spec.id for spec in SERVED]
    for model, reference in mapping.items():
        schema = DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]
        assert schema["properties"]["model"]["const"] == model
        assert schema["required"] == ["model", "input"]


def test_fields_of_a_model() -> None:
    properties = {spec.id: DESCRIBED.properties(spec.id) for spec in SERVED}
    common = {"model", "input", "embedding_type", "input_type", "prompt_name", "output_dtype"}
    assert properties["all-MiniLM-L6-v2"].keys() == common | {"truncate", "normalized", "dimensions"}
    assert properties["jina-embeddings-v2-base-en"].keys() == common | {"truncate", "normalized"}
    dimensions = properties["all-MiniLM-L6-v2"]["dimensions"]["anyOf"]
    assert dimensions == [{"type": "integer", "exclusiveMinimum": 0, "maximum": 384}, {"type": "null"}]
    tasks = properties["jina-embeddings-v3"]["task"]["anyOf"][0]["enum"]
    assert tasks == list(CATALOG.models["jina-embeddings-v3"].tasks)
    assert properties["jina-embeddings-v3"]["input_type"]["enum"] == [
        "query", "document", "search_query", "search_document", "classification", "clustering", None,
    ]  # fmt: skip
    sides = ["query", "document", "search_query", "search_document", None]
    assert properties["jina-colbert-v2"]["input_type"]["enum"] == sides
    assert properties["all-MiniLM-L6-v2"]["prompt_name"]["enum"] == [None]
    assert "task_type" not in properties["all-MiniLM-L6-v2"]
    assert "RETRIEVAL_QUERY" in properties["jina-colbert-v2"]["task_type"]["enum"]


MINILM = {"model": "all-MiniLM-L6-v2"}
V3 = {"model": "jina-embeddings-v3"}


@pytest.mark.parametrize(
    "body",
    [
        {**MINILM, "input": "a"},
        {**MINILM, "input": {"text": "a"}},
        {**MINILM, "input": ["a", {"text": "b"}]},
        {**MINILM, "input": []},
        {**MINILM, "input": ["a"] * 5},
        {**MINILM, "input": [1]},
        {**MINILM, "input": None},
        {**MINILM},
        {**MINILM, "input": "a", "dimensions": 384},
        {**MINILM, "input": "a", "dimensions": 385},
        {**MINILM, "input": "a", "dimensions": 0},
        {**MINILM, "input": "a", "dimensions": 2.0},
        {**MINILM, "input": "a", "dimensions": "two"},
        {**MINILM, "input": "a", "dimensions": None},
        {**MINILM, "input": "a", "normalized": None},
        {**MINILM, "input": "a", "normalized": 1},
        {**MINILM, "input": "a", "truncate": "true"},
        {**MINILM, "input": "a", "embedding_type": None},
        {**MINILM, "input": "a", "embedding_type": "base64"},
        {**MINILM, "input": "a", "embedding_type": "int8"},
        {**MINILM, "input": "a", "embedding_type": ["float", "binary"]},
        {**MINILM, "input": "a", "embedding_type": []},
        {**MINILM, "input": "a", "embedding_type": ["int8"]},
        {**MINILM, "input": "a", "task": "nonsense", "user": 3},
        {**V3, "input": "a", "task": "nonsense"},
        {**V3, "input": "a", "task": "separation"},
        {"model": "jina-colbert-v2", "input": "a", "dimensions": 96},
        {"model": "jina-colbert-v2", "input": "a", "dimensions": 97},
        {"model": "no-such-model", "input": "a"},
        {"input": "a"},
    ],
)
def test_what_the_document_allows_is_what_is_taken(body: dict[str, Any]) -> None:
    try:
        PARSER.parse(body)
        taken = True
    except ServiceError:
        taken = False
    assert DESCRIBED.request.is_valid(body) is taken


@pytest.mark.parametrize(
    "encodings", [(encoding,) for encoding in Encoding] + [(Encoding.FLOAT, Encoding.BASE64, Encoding.BINARY)]
)
def test_answers_are_as_described(encodings: tuple[Encoding, ...]) -> None:
    result = EmbedResult("all-MiniLM-L6-v2", VECTORS, encodings, Usage(9))
    body = response_body(result, response_items(result, 0, 2))
    DESCRIBED.component("EmbeddingResponse").validate(
        orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
    )


def test_errors_are_as_described() -> None:
    with pytest.raises(ServiceError) as caught:
        PARSER.parse({**MINILM, "input": [None, "a"], "dimensions": -1})
    body = orjson.loads(http_body(caught.value, "0" * 32))
    DESCRIBED.component("HTTPValidationError").validate(body)
    unavailable = ServiceError(ErrorCode.SERVICE_UNAVAILABLE)
    DESCRIBED.component("ErrorResponse").validate(orjson.loads(http_body(unavailable, "0" * 32)))


def test_models_are_as_described() -> None:
    DESCRIBED.component("ModelListResponse").validate(models_list(SERVED))
    for spec in CATALOG.models.values():
        DESCRIBED.component("ModelInfo").validate(model_info(spec))


def test_statuses_are_those_of_the_error_table() -> None:
    assert list(DESCRIBED.operation["responses"]) == [
        "200", "400", "401", "403", "413", "422", "429", "500", "503", "504"
    ]  # fmt: skip
    assert "INPUT_TOKEN_LIMIT_EXCEEDED" in DESCRIBED.operation["responses"]["400"]["description"]
    assert "Retry-After" in DESCRIBED.operation["responses"]["429"]["headers"]


def test_without_embedding_models_there_is_no_such_path() -> None:
    document = build_openapi({})
    assert "/v1/embeddings" not in document["paths"]
    assert "/v1/models" in document["paths"]

"""Other vendors' forms of calls, over the same models."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import Api
from tests.gateway.client import Answer, post
from tests.stack import MODEL

TEXTS = ["a cat purrs", "a dog barks", "rain"]
REPOSITORY = f"sentence-transformers/{MODEL}"


def ours(api: Api, **fields: Any) -> list[Any]:
    return [item["embedding"] for item in api.embed(TEXTS, **fields).json["data"]]


def cohere(api: Api, path: str = "/v2/embed", **fields: Any) -> Answer:
    return api.post({"model": MODEL, "texts": TEXTS, "input_type": "search_document", **fields}, path)


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_cohere_embed_by_type(api: Api, path: str) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary"]
    answer = cohere(api, path, embedding_types=kinds).json
    assert answer["response_type"] == "embeddings_by_type"
    assert list(answer["embeddings"]) == kinds
    for kind in kinds:
        assert answer["embeddings"][kind] == ours(api, embedding_type=kind)
    assert answer["texts"] == TEXTS
    assert answer["meta"]["billed_units"]["input_tokens"] == api.embed(TEXTS).json["usage"]["total_tokens"]


def test_cohere_embed_of_old_and_in_parts(api: Api) -> None:
    assert cohere(api, "/v1/embed").json["embeddings"] == ours(api)
    parts = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    assert cohere(api, texts=None, inputs=parts, output_dimension=8).json["embeddings"]["float"] == ours(
        api, dimensions=8
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"truncate": "START"}, "truncate"),
        ({"truncate": ""}, "truncate"),
        ({"input_type": "image"}, "input_type"),
        ({"embedding_types": ["int4"]}, "embedding_types"),
        ({"texts": None}, "texts"),
        ({"texts": None, "inputs": [{"content": [{"type": "audio"}]}]}, "inputs"),
        ({"images": ["data:image/png;base64,AA"]}, "image"),
    ],
    ids=str,
)
def test_cohere_refusals_are_in_its_form(api: Api, fields: dict[str, Any], word: str) -> None:
    answer = cohere(api, **fields)
    assert answer.error() == (422, "VALIDATION_ERROR")
    assert answer.json["message"] == answer.json["detail"]
    assert word in answer.json["message"]


def test_cohere_knows_the_key_and_the_length(api: Api) -> None:
    refused = post(api.stack.http_port, {"model": MODEL, "texts": TEXTS}, path="/v2/embed")
    assert refused.error() == (401, "AUTH_MISSING_API_KEY")
    assert "key" in refused.json["message"]
    long = cohere(api, texts=["word " * 1000], truncate="NONE")
    assert long.error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert cohere(api, texts=["word " * 1000]).status == 200


def test_cohere_rerank(api: Api) -> None:
    expected = api.rerank("feline", TEXTS).json["results"]
    answer = api.post({"model": MODEL, "query": "feline", "documents": TEXTS}, "/v2/rerank").json
    ranked = [{name: item[name] for name in ("index", "relevance_score")} for item in expected]
    assert answer["results"] == ranked
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    body = {"model": MODEL, "query": "feline", "documents": TEXTS, "top_n": 1, "return_documents": True}
    (first,) = api.post(body, "/v2/rerank").json["results"]
    assert first == ranked[0] | {"document": {"text": TEXTS[first["index"]]}}
    wrong = api.post(body | {"top_n": 0}, "/v2/rerank")
    assert wrong.error() == (422, "VALIDATION_ERROR")
    assert wrong.json["message"] == wrong.json["detail"]


def test_voyage(api: Api) -> None:
    answer = api.rerank("feline", TEXTS, top_k=2).json
    assert answer["data"] == answer["results"]
    assert len(answer["data"]) == 2
    assert "data" not in api.rerank("feline", TEXTS, top_n=2).json
    packed = ours(api, output_dtype="int8", output_dimension=8, encoding_format="base64", input_type="query")
    plain = ours(api, output_dtype="int8", output_dimension=8)
    assert [np.frombuffer(b64decode(text), np.int8).tolist() for text in packed] == plain


def test_tei_embed(api: Api) -> None:
    assert api.post({"inputs": TEXTS}, "/embed").json == ours(api)
    assert api.post({"inputs": TEXTS[0]}, "/embed").json == ours(api)[:1]
    plain = api.post({"inputs": TEXTS, "normalize": False}, "/embed").json
    assert plain == ours(api, normalized=False)


def test_tei_rerank(api: Api) -> None:
    expected = api.rerank("feline", TEXTS).json["results"]
    answer = api.post({"query": "feline", "texts": TEXTS, "return_text": True}, "/rerank").json
    assert answer == [
        {"index": each["index"], "score": each["relevance_score"], "text": TEXTS[each["index"]]}
        for each in expected
    ]
    assert "text" not in api.post({"query": "feline", "texts": TEXTS}, "/rerank").json[0]


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/embed", {"inputs": []}, "empty"),
        ("/embed", {"texts": ["a"]}, "inputs"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, "prompt_name"),
        ("/rerank", {"query": "a", "texts": []}, "empty"),
        ("/rerank", {"query": "a", "texts": ["a"], "raw_scores": True}, "raw_scores"),
    ],
)
def test_tei_refusals_are_in_its_form(api: Api, path: str, body: dict[str, Any], word: str) -> None:
    answer = api.post(body, path)
    assert answer.status == 422
    assert answer.json["error_type"] == "Validation"
    assert answer.json["error"] == answer.json["detail"]
    assert word in answer.json["error"]


def test_second_names(api: Api) -> None:
    body = {"model": REPOSITORY, "input": TEXTS}
    assert api.post(body, "/embeddings").json == api.embed(TEXTS).json
    ranking = {"model": REPOSITORY, "query": "feline", "documents": TEXTS}
    assert api.post(ranking, "/rerank").json == api.rerank("feline", TEXTS).json

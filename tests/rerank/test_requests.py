"""Bodies of POST /v1/rerank: what is taken, and the exact 422 of what is not."""

from __future__ import annotations

from typing import Any

import pytest

from services.core.catalog import Catalog
from services.core.catalog.types import Modality
from services.core.content import Media
from services.core.errors import ErrorCode, ServiceError
from services.rerank.parsing import RequestParser
from services.rerank.types import RerankRequest

CATALOG = Catalog.load(aliases={"house-model": "all-MiniLM-L6-v2"})
MINILM = "all-MiniLM-L6-v2"
V2 = "jina-reranker-v2-base-multilingual"
V3 = "jina-reranker-v3"
M0 = "jina-reranker-m0"
COLBERT = "jina-colbert-v2"
SERVED = CATALOG.select([MINILM, V2, V3, M0, COLBERT, "jina-embeddings-v3"])
PARSER = RequestParser(CATALOG, SERVED, max_documents=8)

STRING = "Input should be a valid string"
EMPTY = "Documents cannot be empty. Provide at least one document."
AT_LEAST_ONE = "Input should be greater than or equal to 1"
AT_MOST = "Input should be less than or equal to 512"
URI = "data:image/png;base64,AAAA"
ODD = ["", " \t", "a\0b", "https://example.com/cat.png"]
ITEM = "Input should be a string or an object with 'text'"
URL = "https://example.com/cat.png"


def parse(**body: Any) -> RerankRequest:
    return PARSER.parse({"model": MINILM, "query": "q", "documents": ["a"]} | body)


def refusal(body: dict[str, Any]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        PARSER.parse(body)
    return caught.value


def errors(**body: Any) -> list[tuple[str, str, str]]:
    error = refusal({"model": MINILM, "query": "q", "documents": ["a"]} | body)
    assert error.code is ErrorCode.VALIDATION_ERROR
    return [(e.field, e.type, e.message) for e in error.field_errors]


def test_defaults() -> None:
    assert parse() == RerankRequest(MINILM, "q", ["a"], max_document_length=512)
    assert parse(model=V2) == RerankRequest(V2, "q", ["a"])
    assert parse(model=V3) == RerankRequest(V3, "q", ["a"], max_document_length=2048)
    request = parse()
    assert (request.top_n, request.return_documents, request.truncate) == (None, True, True)
    assert request.return_embeddings is False


@pytest.mark.parametrize("model", [MINILM, V2, V3, M0, COLBERT])
def test_null_is_the_default(model: str) -> None:
    fields = ("top_n", "return_documents", "truncation", "return_embeddings")
    assert parse(model=model, **dict.fromkeys(fields)) == parse(model=model)
    assert parse(model=model, max_doc_length=None).max_document_length is None


@pytest.mark.parametrize(
    ("documents", "texts"),
    [
        (["one"], ["one"]),
        (["one", {"text": "two"}], ["one", "two"]),
        ([{"text": "one", "id": 7, "image": "x"}, {"text": ""}], ["one", ""]),
        (ODD, ODD),
        (["a"] * 8, ["a"] * 8),
    ],
)
def test_documents(documents: Any, texts: list[str]) -> None:
    for model in (MINILM, V2, V3, M0, COLBERT):
        assert parse(model=model, documents=documents).documents == texts


@pytest.mark.parametrize("query", ["q", {"text": "q"}, {"text": "q", "lang": "en"}])
def test_queries(query: Any) -> None:
    assert parse(query=query).query == "q"
    assert parse(model=M0, query=query).query == "q"


def test_images_for_a_model_that_takes_them() -> None:
    request = parse(
        model=M0, query={"image": "aGk="}, documents=["a", {"image": URL, "id": 3}, {"text": "b"}]
    )
    assert request.query == Media(Modality.IMAGE, "aGk=")
    assert request.documents == ["a", Media(Modality.IMAGE, URL), "b"]


@pytest.mark.parametrize("key", ["image", "audio", "video", "pdf", "content", "url", "bytes"])
def test_media_for_a_model_of_texts(key: str) -> None:
    message = f"Model '{MINILM}' takes text only, not '{key}'."
    assert errors(documents=["a", {key: "x"}]) == [
        (f"body -> {MINILM} -> documents -> 1", "unsupported_modality", message)
    ]
    assert errors(query={key: "x"}) == [(f"body -> {MINILM} -> query", "unsupported_modality", message)]


@pytest.mark.parametrize(
    ("fields", "place", "kind", "message"),
    [
        ({"documents": []}, ["documents"], "too_short", EMPTY),
        ({"documents": ["a"] * 9}, ["documents"], "too_long", "A request can contain at most 8 documents."),
        ({"documents": "a"}, ["documents"], "list_type", "Input should be a valid list"),
        ({"documents": {"text": "a"}}, ["documents"], "list_type", "Input should be a valid list"),
        ({"documents": None}, ["documents"], "list_type", "Input should be a valid list"),
        ({"documents": ["a", 1]}, ["documents", 1], "text_type", ITEM),
        ({"documents": [["a"]]}, ["documents", 0], "text_type", ITEM),
        ({"documents": [None]}, ["documents", 0], "text_type", ITEM),
        ({"documents": [{}]}, ["documents", 0, "text"], "missing", "Field required"),
        ({"documents": [{"text": 1}]}, ["documents", 0, "text"], "string_type", STRING),
        ({"query": 1}, ["query"], "text_type", ITEM),
        ({"query": None}, ["query"], "text_type", ITEM),
        ({"query": ["q"]}, ["query"], "text_type", ITEM),
        ({"query": {}}, ["query", "text"], "missing", "Field required"),
        ({"query": {"text": None}}, ["query", "text"], "string_type", STRING),
        ({"top_n": 0}, ["top_n"], "greater_than_equal", AT_LEAST_ONE),
        ({"top_n": -1}, ["top_n"], "greater_than_equal", AT_LEAST_ONE),
        ({"top_n": 1.5}, ["top_n"], "int_type", "Input should be a valid integer"),
        ({"top_n": "one"}, ["top_n"], "int_type", "Input should be a valid integer"),
        ({"top_n": True}, ["top_n"], "int_type", "Input should be a valid integer"),
        ({"top_k": 0}, ["top_k"], "greater_than_equal", AT_LEAST_ONE),
        ({"return_documents": "no"}, ["return_documents"], "bool_type", "Input should be a valid boolean"),
        ({"truncation": 2}, ["truncation"], "bool_type", "Input should be a valid boolean"),
        ({"truncate": "y"}, ["truncate"], "bool_type", "Input should be a valid boolean"),
        ({"max_doc_length": 0}, ["max_doc_length"], "greater_than_equal", AT_LEAST_ONE),
        ({"max_doc_length": 513}, ["max_doc_length"], "less_than_equal", AT_MOST),
        ({"return_embeddings": 3}, ["return_embeddings"], "bool_type", "Input should be a valid boolean"),
    ],
)
def test_refused_fields(fields: dict[str, Any], place: list[str | int], kind: str, message: str) -> None:
    path = " -> ".join(["body", MINILM, *map(str, place)])
    assert errors(**fields) == [(path, kind, message)]


@pytest.mark.parametrize("field", ["query", "documents"])
def test_required_fields(field: str) -> None:
    body = {"model": MINILM, "query": "q", "documents": ["a"]}
    del body[field]
    assert [(e.field, e.type) for e in refusal(body).field_errors] == [
        (f"body -> {MINILM} -> {field}", "missing")
    ]


@pytest.mark.parametrize(
    ("document", "place", "kind"),
    [
        ({"image": 5}, ["image"], "string_type"),
        ({"image": ""}, ["image"], "string_too_short"),
        ({"image": None}, ["image"], "string_type"),
        ({"pdf": "x"}, [], "unsupported_modality"),
        ({"text": 5, "image": URL}, ["text"], "string_type"),
        ({}, ["text"], "missing"),
    ],
)
def test_bad_images(document: Any, place: list[str], kind: str) -> None:
    path = " -> ".join(["body", M0, "documents", "1", *place])
    found = [(field, error) for field, error, _ in errors(model=M0, documents=["a", document])]
    assert found == [(path, kind)]


def test_fields_a_model_does_not_have_are_ignored() -> None:
    fields = {"max_doc_length": "x", "return_embeddings": "x", "user": 3, "task": []}
    assert parse(model=V2, **fields) == parse(model=V2)


@pytest.mark.parametrize(
    ("names", "value", "field", "expected"),
    [
        (("top_n", "top_k"), 3, "top_n", 3),
        (("top_n", "top_k"), 3.0, "top_n", 3),
        (("max_doc_length", "max_tokens_per_doc"), 64, "max_document_length", 64),
        (("truncation", "truncate"), False, "truncate", False),
    ],
)
def test_other_names(names: tuple[str, str], value: Any, field: str, expected: Any) -> None:
    real, other = names
    assert getattr(parse(**{real: value}), field) == expected
    assert getattr(parse(**{other: value}), field) == expected
    assert getattr(parse(**{real: value, other: None}), field) == expected


@pytest.mark.parametrize("name", ["jina-ai/", "jinaai/"])
def test_prefixes_and_aliases(name: str) -> None:
    assert parse(model=name + V2).model == V2
    assert parse(model="house-model").model == "house-model"


@pytest.mark.parametrize("model", ["jina-embeddings-v3", "jina-reranker-v1-tiny-en", "nope", ""])
def test_models_that_do_not_rank_here(model: str) -> None:
    error = refusal({"model": model, "query": "q", "documents": ["a"]})
    assert error.code is ErrorCode.INPUT_MODEL_NOT_FOUND
    names = ", ".join([MINILM, V2, V3, M0, COLBERT, "house-model"])
    assert error.detail == f"Model '{model}' not found. Available models: {names}."


def test_many_bad_documents_are_not_all_named() -> None:
    parser = RequestParser(CATALOG, SERVED, max_documents=2048)
    with pytest.raises(ServiceError) as caught:
        parser.parse({"model": MINILM, "query": "q", "documents": [None] * 2048})
    assert len(caught.value.field_errors) == 10

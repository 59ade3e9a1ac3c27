"""Reranking as clients call it: through the gateway, with every kind of bad input, beside others' calls."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from searchfoundation.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc

from tests.e2e.conftest import Api
from tests.stack import MODEL, http_get, wait_for

QUERY = "How do plants make food?"
DOCUMENTS = [
    "The stock market fell on Monday.",
    {"text": "Photosynthesis turns light, water and carbon dioxide into sugar.", "id": 7},
    "Leaves are green because of chlorophyll.",
    "The stock market fell on Monday.",
]
WORDS = ("river", "stone", "light", "engine", "paper", "garden", "cloud", "music", "table", "winter")


def test_a_ranking(api: Api) -> None:
    answer = api.rerank(QUERY, DOCUMENTS, top_n=3)
    assert answer.status == 200
    assert answer.headers["server-timing"].startswith("tokenize;dur=")
    body = answer.json
    assert list(body) == ["model", "object", "usage", "results"]
    assert (body["model"], body["object"], list(body["usage"])) == (MODEL, "list", ["total_tokens"])
    assert [each["index"] for each in body["results"]] == [1, 2, 0]
    assert [each["document"] for each in body["results"]] == [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[0]]
    assert all(list(each) == ["index", "relevance_score", "document"] for each in body["results"])


def test_ties_keep_the_order_of_the_request(api: Api) -> None:
    """In bf16, whose rounding would tell equal texts apart if they ran in different batches."""
    documents = ["the same text"] * 700 + ["quite another one"] + ["the same text"] * 700
    results = api.rerank("the same text", documents, return_documents=False).json["results"]
    same = [*range(700), *range(701, 1401)]
    assert [each["index"] for each in results] == [*same, 700]
    assert len({each["relevance_score"] for each in results}) == 2


@pytest.mark.parametrize(
    ("fields", "place", "kind"),
    [
        ({"documents": []}, "documents", "too_short"),
        ({"documents": ["a"] * 2049}, "documents", "too_long"),
        ({"documents": "a"}, "documents", "list_type"),
        ({"documents": None}, "documents", "list_type"),
        ({"documents": ["a", None]}, "documents -> 1", "text_type"),
        ({"documents": ["a", {"title": "b"}]}, "documents -> 1 -> text", "missing"),
        ({"documents": [{"image": "https://example.com/a.png"}]}, "documents -> 0", "unsupported_modality"),
        ({"query": {"image": "aGk="}}, "query", "unsupported_modality"),
        ({"query": None}, "query", "text_type"),
        ({"query": ["q"]}, "query", "text_type"),
        ({"top_n": 0}, "top_n", "greater_than_equal"),
        ({"top_n": -3}, "top_n", "greater_than_equal"),
        ({"top_n": "one"}, "top_n", "int_type"),
        ({"top_k": 0}, "top_k", "greater_than_equal"),
        ({"return_documents": "yes"}, "return_documents", "bool_type"),
        ({"truncation": "yes"}, "truncation", "bool_type"),
        ({"max_doc_length": 0}, "max_doc_length", "greater_than_equal"),
        ({"max_doc_length": 100_000}, "max_doc_length", "less_than_equal"),
        ({"return_embeddings": []}, "return_embeddings", "bool_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_validate(api: Api, fields: dict[str, Any], place: str, kind: str) -> None:
    answer = api.post({"model": MODEL, "query": "q", "documents": ["a"]} | fields, "/v1/rerank")
    assert answer.error() == (422, "VALIDATION_ERROR")
    (error,) = answer.json["errors"]
    assert (error["field"], error["type"]) == (f"body -> {MODEL} -> {place}", kind)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"model": 5}', b'{"model":"' + MODEL.encode() + b'"}']
)
def test_bodies_that_are_no_request(api: Api, body: bytes) -> None:
    assert api.post(body, "/v1/rerank").error() == (422, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    "model", ["nope", "jina-reranker-v3", "jina-ai/jina-reranker-m0", "jina-embeddings-v3"]
)
def test_models_that_are_not_served(api: Api, model: str) -> None:
    assert api.rerank("q", [{"image": "x"}], model=model).error() == (400, "INPUT_MODEL_NOT_FOUND")


def test_long_documents(api: Api) -> None:
    long = ["a", "word " * 50_000]
    refused = api.rerank("q", long, truncation=False)
    assert refused.error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    for truncation in (True, None):
        answer = api.rerank("q", long, truncation=truncation, return_documents=False)
        assert answer.json["usage"]["total_tokens"] == 3 + 3 + 512
    cut = api.rerank("q", long, max_tokens_per_doc=16, return_documents=False)
    assert cut.json["usage"]["total_tokens"] == 3 + 3 + 16


def test_2048_documents_with_their_vectors(api: Api) -> None:
    answer = api.rerank("stone", [f"document {n}" for n in range(2048)], return_embeddings=True)
    assert answer.status == 200
    results = answer.json["results"]
    assert sorted(each["index"] for each in results) == list(range(2048))
    assert {len(each["embedding"]) for each in results} == {384}


def waiting(api: Api) -> float:
    """Tokens in the queue."""
    _, page = http_get(api.stack.services[0].metrics_port, "/metrics")
    found = re.search(r"^searchfoundation_queue_tokens\{.*\} (.*)$", page.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_thousand_documents_beside_interactive_calls(api: Api) -> None:
    """While 1,000 documents are ranked, short calls of the same key are answered one after the other."""
    documents = [" ".join(WORDS[(n + k * k) % 10] for k in range(20)) + f" {n}" for n in range(1000)]
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(api.rerank, "music in the garden", documents, return_documents=False)
        wait_for(lambda: waiting(api) > 0)
        answered = 0
        while not large.done():
            assert api.embed("a short text").status == 200
            answered += 1
    body = large.result().json
    assert len(body["results"]) == 1000
    assert answered >= 3, "behind the ranking there would have been one"


def test_grpc_through_the_gateway(api: Api) -> None:
    start = rerank_pb2.RerankStart(model=MODEL, query=common_pb2.Content(text=QUERY))
    texts = [each if isinstance(each, str) else each["text"] for each in DOCUMENTS]

    def messages() -> Any:
        yield rerank_pb2.RerankStreamRequest(start=start)
        for text in texts:
            documents = rerank_pb2.RerankDocuments(documents=[common_pb2.Content(text=text)])
            yield rerank_pb2.RerankStreamRequest(documents=documents)

    metadata = (("authorization", f"Bearer {api.key}"),)
    with grpc.insecure_channel(f"127.0.0.1:{api.stack.grpc_port}") as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        streamed = stub.RerankStream(messages(), metadata=metadata, timeout=100)
        request = rerank_pb2.RerankRequest(
            model=MODEL, query=start.query, documents=[common_pb2.Content(text=text) for text in texts]
        )
        single = stub.Rerank(request, metadata=metadata, timeout=100)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RerankStream(messages(), timeout=100)
    assert (
        [each.index for each in streamed.results] == [each.index for each in single.results] == [1, 2, 0, 3]
    )
    assert [each.document.text for each in single.results] == [texts[n] for n in (1, 2, 0, 3)]
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_document_has_the_path(api: Api) -> None:
    from tests.gateway.client import get

    document = json.loads(get(api.stack.http_port, "/openapi.json").body)
    assert {"/v1/embeddings", "/v1/rerank"} <= document["paths"].keys()
    assert "AllMiniLML6V2RerankingRequest" in document["components"]["schemas"]

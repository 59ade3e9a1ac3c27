"""The decoder-based models through the gateway and gRPC, over tiny checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from searchfoundation.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc

from tests.decoder_checkpoints import write_served
from tests.e2e.conftest import Api
from tests.stack import Stack

NANO, CODE, RERANKER = "jina-embeddings-v5-text-nano", "jina-code-embeddings-0.5b", "jina-reranker-v3"
MODELS = (NANO, CODE, RERANKER)
DOCUMENTS = ["a fox", "hello world", {"text": "it is me"}]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("decoders")
    for model in MODELS:
        write_served(folder / "models", model)
    with Stack(folder, {"SF_DTYPE": "float32"}) as stack:
        stack.serve("embed", "rerank", "classify", models=MODELS, SF_MODEL_DIR=str(folder / "models"))
        stack.gateway()
        yield Api(stack, stack.create_key())


def vector(api: Api, **fields: object) -> np.ndarray:
    answer = api.embed("hello world", **fields)
    assert answer.status == 200, answer.json
    return np.array(answer.json["data"][0]["embedding"])


def test_tasks_differ_and_the_default_is_one_of_them(decoders: Api) -> None:
    names = ("retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification")
    vectors = [vector(decoders, model=NANO, task=task) for task in names]
    assert {each.shape for each in vectors} == {(768,)}
    for i, each in enumerate(vectors):
        assert np.linalg.norm(each) == pytest.approx(1.0, abs=1e-5)
        assert all(each @ other < 0.9999 for other in vectors[:i])
    np.testing.assert_allclose(vector(decoders, model=NANO), vectors[2], atol=1e-6)
    code = vector(decoders, model=CODE)
    np.testing.assert_allclose(code, vector(decoders, model=CODE, task="nl2code.query"), atol=1e-6)
    assert code @ vector(decoders, model=CODE, task="nl2code.passage") < 0.9999


def test_a_vector_may_be_shortened(decoders: Api) -> None:
    whole, short = vector(decoders, model=NANO), vector(decoders, model=NANO, dimensions=64)
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


def test_usage_counts_the_prompt_and_all_its_tokens(decoders: Api) -> None:
    usage = decoders.embed("hello", model=CODE, task="nl2code.passage").json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] == len("Candidate code snippet:\n") + 1


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"task": "retrieval"}, "task"),
        ({"task": "classification.query"}, "task"),
        ({"dimensions": 769}, "dimensions"),
    ],
)
def test_what_the_model_has_not_is_refused(decoders: Api, fields: dict[str, object], place: str) -> None:
    answer = decoders.embed(model=NANO, **fields)
    assert answer.error() == (422, "VALIDATION_ERROR")
    assert place in str(answer.json["errors"])


def test_documents_are_ranked_together_and_echoed_as_objects(decoders: Api) -> None:
    answer = decoders.rerank("hello", DOCUMENTS, model=RERANKER, return_embeddings=True)
    assert answer.status == 200, answer.json
    results = answer.json["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    texts = ["a fox", "hello world", "it is me"]
    for result in results:
        assert result["document"] == {"text": texts[result["index"]]}
        assert np.linalg.norm(result["embedding"]) == pytest.approx(1.0, abs=1e-5)
        assert len(result["embedding"]) == 512
    top = decoders.rerank("hello", DOCUMENTS, model=RERANKER, top_n=1, max_doc_length=1)
    assert len(top.json["results"]) == 1
    assert top.json["usage"]["total_tokens"] == 1 + 3
    assert decoders.rerank("hello", DOCUMENTS, model=RERANKER, max_doc_length=8193).status == 422


def test_both_doors_rank_alike(decoders: Api) -> None:
    rest = {
        r["index"]: r["relevance_score"]
        for r in decoders.rerank("hello", DOCUMENTS, model=RERANKER).json["results"]
    }
    texts = ["a fox", "hello world", "it is me"]
    request = rerank_pb2.RerankRequest(
        model=RERANKER,
        query=common_pb2.Content(text="hello"),
        documents=[common_pb2.Content(text=text) for text in texts],
    )
    port = decoders.stack.services[0].grpc_port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        answer = stub.Rerank(request, metadata=list(decoders.authorization.items()), timeout=100)
    assert {r.index: pytest.approx(r.relevance_score, abs=1e-6) for r in answer.results} == rest


def test_texts_are_classified_by_the_labels_vectors(decoders: Api) -> None:
    answer = decoders.classify(model=NANO, input=["hello world", "a fox"], labels=["hello", "fox"])
    assert answer.status == 200, answer.json
    assert [each["prediction"] in ("hello", "fox") for each in answer.json["data"]] == [True, True]

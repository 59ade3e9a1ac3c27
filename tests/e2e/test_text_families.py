"""Every text family through Envoy, over REST and typed gRPC, beside references in float64."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc, rerank_pb2, rerank_pb2_grpc

from services.core.catalog import Catalog
from tests import text_references as reference
from tests.e2e.conftest import Api
from tests.gateway.client import get
from tests.stack import Stack
from tests.text_checkpoints import TASKS, write_model

V2, CODE, V3 = "jina-embeddings-v2-base-en", "jina-embeddings-v2-base-code", "jina-embeddings-v3"
COLBERT_V1, COLBERT, ELSER = "jina-colbert-v1-en", "jina-colbert-v2", "elser-v2"
TINY, RERANKER = "jina-reranker-v1-tiny-en", "jina-reranker-v2-base-multilingual"
RERANKERS = (TINY, RERANKER, COLBERT_V1, COLBERT)
MODELS = (V2, CODE, V3, ELSER, *RERANKERS)
TEXTS = ["the quick brown fox", "hello world", "a dog, a fox.", "", "hello dog"]
TOP, THRESHOLD = 4, 0.3
TASK_NUMBERS = {
    task: common_pb2.Task.Value(f"TASK_{task.upper().replace('.', '_').replace('-', '_')}") for task in TASKS
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("families")
    for model in MODELS:
        write_model(folder / "models", model)
    settings = {
        "SF_MODEL_DIR": str(folder / "models"),
        "SF_DTYPE": "float32",
        "SF_SPARSE_TOP_K": str(TOP),
        "SF_SPARSE_THRESHOLD": str(THRESHOLD),
    }
    with Stack(folder, settings) as stack:
        stack.serve("embed", "rerank", "classify", models=MODELS)
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.fixture(scope="module")
def channel(families: Api) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"{families.stack.host}:{families.stack.grpc_port}") as channel:
        yield channel


def folder_of(api: Api, model: str) -> Path:
    return Path(api.stack.settings["SF_MODEL_DIR"]) / model


def answer_of(api: Api, **fields: Any) -> Any:
    answer = api.embed(**fields)
    assert answer.status == 200, answer.json
    return answer.json


def vectors(api: Api, **fields: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in answer_of(api, **fields)["data"]], np.float32)


def typed(
    api: Api, channel: grpc.Channel, model: str, *texts: str, **options: Any
) -> embed_pb2.EmbedResponse:
    request = embed_pb2.EmbedRequest(
        model=model,
        inputs=[common_pb2.Content(text=text) for text in texts],
        options=embed_pb2.EmbedOptions(**options),
    )
    metadata = (("authorization", f"Bearer {api.key}"), ("x-model", model))
    return embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, metadata=metadata, timeout=100)


def dense(response: embed_pb2.EmbedResponse) -> np.ndarray:
    return np.array([embedding.dense.values for embedding in response.embeddings], np.float32)


@pytest.mark.parametrize("model", [V2, CODE])
def test_vectors_of_v2(families: Api, channel: grpc.Channel, model: str) -> None:
    folder = folder_of(families, model)
    ids = [reference.tokens(folder, text) for text in TEXTS]
    wanted = reference.unit(np.stack([reference.states_v2(folder, each).mean(0) for each in ids]))
    answer = answer_of(families, input=TEXTS, model=model)
    found = np.array([item["embedding"] for item in answer["data"]])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert answer["usage"]["total_tokens"] == sum(map(len, ids))
    response = typed(families, channel, model, *TEXTS)
    np.testing.assert_allclose(dense(response), wanted, atol=1e-5)
    assert response.usage.total_tokens == sum(map(len, ids))


def test_each_task_of_v3_has_vectors_of_its_own(families: Api, channel: grpc.Channel) -> None:
    folder, text = folder_of(families, V3), "hello world"
    rows: list[np.ndarray] = []
    for task in (None, *TASKS):
        ids = reference.tokens(folder, reference.prompted(folder, text, task))
        wanted = reference.unit(reference.states_v3(folder, ids, task).mean(0))
        answer = answer_of(families, input=text, model=V3, task=task)
        np.testing.assert_allclose(answer["data"][0]["embedding"], wanted, atol=1e-5)
        assert answer["usage"]["total_tokens"] == len(ids)
        response = typed(families, channel, V3, text, task=TASK_NUMBERS.get(task))
        np.testing.assert_allclose(dense(response)[0], wanted, atol=1e-5)
        rows.append(wanted)
    assert all(float(a @ b) < 0.999 for i, a in enumerate(rows) for b in rows[:i])


@pytest.mark.parametrize("task", [None, "retrieval.passage"])
def test_late_chunking(families: Api, channel: grpc.Channel, task: str | None) -> None:
    texts = TEXTS[:3]
    wanted = reference.late_chunks(folder_of(families, V3), texts, task)
    late = vectors(families, input=texts, model=V3, late_chunking=True, task=task)
    np.testing.assert_allclose(late, wanted, atol=1e-5)
    assert np.abs(late - vectors(families, input=texts, model=V3, task=task)).max() > 1e-3
    response = typed(families, channel, V3, *texts, late_chunking=True, task=TASK_NUMBERS.get(task))
    np.testing.assert_allclose(dense(response), wanted, atol=1e-5)


def test_what_late_chunking_does_not_do(families: Api, channel: grpc.Channel) -> None:
    long = ["hello " * 5000] * 2
    assert families.embed(long, model=V3, late_chunking=True).error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert families.embed(["a", ""], model=V3, late_chunking=True).error() == (400, "INPUT_INVALID")
    with pytest.raises(grpc.RpcError) as caught:
        typed(families, channel, V3, *long, late_chunking=True)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    # Models without it do not know the field.
    np.testing.assert_array_equal(
        vectors(families, input=TEXTS, model=V2, late_chunking=True), vectors(families, input=TEXTS, model=V2)
    )


def test_dimensions_are_cut_before_the_length_is_made_one(families: Api) -> None:
    whole = vectors(families, input=TEXTS, model=V3)
    for width in (32, 256, 1024):
        found = vectors(families, input=TEXTS, model=V3, dimensions=width)
        np.testing.assert_allclose(found, reference.unit(whole[:, :width]), atol=1e-5)


def test_a_task_that_does_not_exist(families: Api) -> None:
    answer = families.embed("hello", model=V3, task="clustering")
    assert answer.error() == (422, "VALIDATION_ERROR")
    assert answer.json["errors"][0]["field"] == f"body -> {V3} -> task"


@pytest.mark.parametrize("model", [COLBERT_V1, COLBERT])
@pytest.mark.parametrize("role", ["query", "document"])
def test_token_vectors_in_every_type(families: Api, channel: grpc.Channel, role: str, model: str) -> None:
    write = reference.colbert_query if role == "query" else reference.colbert_document
    wanted = [write(folder_of(families, model), text) for text in TEXTS]
    types = ["float", "base64", "binary", "ubinary"]
    answer = answer_of(families, input=TEXTS, model=model, input_type=role, embedding_type=types)
    for item, expected in zip(answer["data"], wanted, strict=True):
        assert item["object"] == "embeddings"
        by_type = item["embeddings_by_type"]
        found = np.array(by_type["float"], np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in by_type["base64"]]
        np.testing.assert_array_equal(decoded, found)
        np.testing.assert_array_equal(by_type["ubinary"], np.packbits(found > 0, axis=1))
        np.testing.assert_array_equal(np.array(by_type["binary"]) + 128, by_type["ubinary"])
    roles = {"query": common_pb2.INPUT_ROLE_QUERY, "document": common_pb2.INPUT_ROLE_DOCUMENT}
    response = typed(families, channel, model, *TEXTS, role=roles[role])
    for embedding, expected in zip(response.embeddings, wanted, strict=True):
        rows = [vector.values for vector in embedding.multi.vectors]
        np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("dimensions", [64, 96, 128])
def test_token_vectors_of_each_width(families: Api, dimensions: int) -> None:
    answer = answer_of(families, input=TEXTS, model=COLBERT, dimensions=dimensions)
    for item, text in zip(answer["data"], TEXTS, strict=True):
        whole = reference.colbert_document(folder_of(families, COLBERT), text)
        np.testing.assert_allclose(item["embeddings"], reference.unit(whole[:, :dimensions]), atol=1e-5)


def test_sparse_vectors(families: Api, channel: grpc.Channel) -> None:
    answer = answer_of(families, input=TEXTS, model=ELSER)
    response = typed(families, channel, ELSER, *TEXTS)
    cut = below = 0
    for item, embedding, text in zip(answer["data"], response.embeddings, TEXTS, strict=True):
        whole = reference.sparse_weights(folder_of(families, ELSER), text)
        wanted = {token: weight for token, weight in whole.items() if weight > THRESHOLD}
        below += len(whole) > len(wanted)
        cut += len(wanted) > TOP
        wanted = dict(list(wanted.items())[:TOP])
        assert item["object"] == "embedding"
        assert list(item["embedding"]) == list(wanted)
        assert item["embedding"] == pytest.approx(wanted, abs=1e-5)
        sparse = embedding.sparse
        assert dict(zip(sparse.tokens, sparse.weights, strict=True)) == pytest.approx(wanted, abs=1e-5)
    assert cut, "no text has more entries than are kept"
    assert below, "no entry lies below the threshold"
    entries = sum(len(item["embedding"]) for item in answer["data"])
    assert answer["usage"]["output_tokens"] == response.usage.output_tokens == entries
    assert families.embed("a", model=ELSER, embedding_type="base64").error() == (422, "VALIDATION_ERROR")


@pytest.mark.parametrize("model", RERANKERS)
def test_the_order_of_documents_is_the_references(families: Api, channel: grpc.Channel, model: str) -> None:
    score = reference.scorer(folder_of(families, model))
    documents = [*TEXTS, "hello world " * 700] if model == RERANKER else TEXTS  # the last in windows
    scores = np.array([score("hello fox", document) for document in documents])
    assert np.ptp(scores) > 1e-3
    answer = families.rerank("hello fox", documents, model=model, return_documents=False)
    assert answer.status == 200, answer.json
    results = answer.json["results"]
    order = [result["index"] for result in results]
    assert sorted(order) == list(range(len(documents)))
    assert np.all(np.diff(scores[order]) < 1e-6), "what float64 tells apart by less, fp32 may not"
    wanted = pytest.approx(scores[order].tolist(), abs=1e-4)
    assert [result["relevance_score"] for result in results] == wanted
    request = rerank_pb2.RerankRequest(
        model=model,
        query=common_pb2.Content(text="hello fox"),
        documents=[common_pb2.Content(text=document) for document in documents],
    )
    metadata = (("authorization", f"Bearer {families.key}"), ("x-model", model))
    stub = rerank_pb2_grpc.RerankServiceStub(channel)
    response = stub.Rerank(request, metadata=metadata, timeout=100)
    assert [result.index for result in response.results] == order
    assert [result.relevance_score for result in response.results] == wanted
    assert response.usage.total_tokens == answer.json["usage"]["total_tokens"]


def test_a_long_document_is_read_in_windows(families: Api) -> None:
    """What answers the query stands behind the first window, and counts."""
    folder = folder_of(families, RERANKER)
    documents = ["the " * 1500 + "quick brown fox " * 20, "the " * 1500]
    assert [len(reference.windows(folder, "hello", document)) for document in documents] == [2, 2]
    answer = families.rerank("hello", documents, model=RERANKER, truncation=False, return_documents=False)
    assert answer.status == 200, answer.json
    score = reference.scorer(folder)
    wanted = {i: pytest.approx(score("hello", document), abs=1e-5) for i, document in enumerate(documents)}
    assert {each["index"]: each["relevance_score"] for each in answer.json["results"]} == wanted
    lengths = [len(reference.tokens(folder, text)) for text in ("hello", *documents)]
    assert answer.json["usage"]["total_tokens"] == sum(lengths)


@pytest.mark.parametrize(("model", "limit"), [(V2, 8192), (CODE, 8192), (V3, 8194)])
def test_a_text_over_the_context_of_an_encoder(families: Api, model: str, limit: int) -> None:
    answer = families.embed("hello " * 9000, model=model)
    assert answer.error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert str(limit) in answer.json["detail"]


@pytest.mark.parametrize(
    ("model", "role", "tokens"), [(ELSER, None, 512), (COLBERT_V1, "query", 32), (COLBERT, "query", 32)]
)
def test_models_that_always_cut(families: Api, model: str, role: str | None, tokens: int) -> None:
    answer = answer_of(families, input="hello " * 700, model=model, input_type=role)
    assert answer["usage"]["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("model", "query", "document", "limit"),
    [
        (TINY, "hello", "hello " * 9000, 8192),
        (RERANKER, "hello " * 600, "hello", 512),
        (COLBERT, "hello " * 40, "hello", 32),
    ],
)
def test_a_text_over_the_limit_of_a_reranker(
    families: Api, model: str, query: str, document: str, limit: int
) -> None:
    answer = families.rerank(query, [document], model=model, truncation=False)
    assert answer.error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert str(limit) in answer.json["detail"]


@pytest.mark.parametrize("model", [V2, V3])
def test_encoders_of_vectors_also_classify(families: Api, model: str) -> None:
    answer = families.classify(model=model, labels=["a dog", "the fox", "hello world"])
    assert answer.status == 200, answer.json
    assert sum(each["score"] for each in answer.json["data"][0]["predictions"]) == pytest.approx(1, abs=1e-4)


def test_the_list_of_models(families: Api) -> None:
    answer = get(families.stack.http_port, "/v1/models")
    entries = {entry["id"].rpartition("/")[2]: entry for entry in answer.json["data"]}
    assert entries.keys() == set(MODELS)
    for model, entry in entries.items():
        spec = Catalog.load().require(model)
        assert entry["context_length"] == spec.context_length
        one = get(families.stack.http_port, f"/v1/models/{entry['id']}")
        assert (one.status, one.json) == (200, entry)

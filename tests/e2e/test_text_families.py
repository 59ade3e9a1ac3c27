"""Every text family through Envoy: tasks, late chunking, token vectors, sparse vectors, rerankers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc

from services.core.catalog import Catalog
from services.core.modeling.registry import load_cross_encoder, load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.e2e.conftest import Api
from tests.gateway.client import get
from tests.stack import Stack
from tests.text_checkpoints import write_model

V3, COLBERT, ELSER = "jina-embeddings-v3", "jina-colbert-v2", "elser-v2"
RERANKERS = ("jina-reranker-v1-tiny-en", "jina-reranker-v2-base-multilingual", COLBERT)
MODELS = (V3, ELSER, *RERANKERS)
CPU = torch.device("cpu")
TEXTS = ["the quick brown fox", "hello world", "a dog, a fox.", "", "hello dog"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("families")
    for model in MODELS:
        write_model(folder / "models", model)
    settings = {"SF_MODEL_DIR": str(folder / "models"), "SF_DTYPE": "float32"}
    with Stack(folder, settings) as stack:
        stack.serve("embed", "rerank", "classify", models=MODELS)
        stack.gateway()
        yield Api(stack, stack.create_key())


def folder_of(api: Api, model: str) -> Path:
    return Path(api.stack.settings["SF_MODEL_DIR"]) / model


def network(api: Api, model: str) -> TextEncoder:
    return load_text_encoder(
        Catalog.load().require(model), folder_of(api, model), device=CPU, dtype=torch.float32
    )


def vectors(api: Api, **fields: object) -> np.ndarray:
    answer = api.embed(**fields)
    assert answer.status == 200, answer.json
    return np.array([item["embedding"] for item in answer.json["data"]], np.float32)


def test_tasks_and_late_chunking(families: Api) -> None:
    tasks = Catalog.load().require(V3).tasks
    found = [vectors(families, input="hello world", model=V3, task=task)[0] for task in tasks]
    assert all(float(a @ b) < 0.999 for i, a in enumerate(found) for b in found[:i])
    texts = TEXTS[:3]
    plain = vectors(families, input=texts, model=V3)
    late = vectors(families, input=texts, model=V3, late_chunking=True)
    encoder = network(families, V3)
    (whole,) = encoder.tokenizer.encode_batch([" ".join(texts)])
    sizes = [len(each.ids) - 2 for each in encoder.tokenizer.encode_batch(texts)]
    first, second, _ = 1 + np.cumsum(sizes)
    spans = ((0, first), (first, second), (second, len(whole.ids)))
    (wanted,) = encoder.forward([EncodeItem(whole.ids, spans=spans)])
    wanted = np.asarray(wanted) / np.linalg.norm(np.asarray(wanted), axis=1, keepdims=True)
    np.testing.assert_allclose(late, wanted, atol=1e-5)
    assert np.abs(late - plain).max() > 1e-3


def test_a_task_that_does_not_exist(families: Api) -> None:
    answer = families.embed("hello", model=V3, task="clustering")
    assert answer.status == 422
    assert answer.json["errors"][0]["field"] == f"body -> {V3} -> task"


@pytest.mark.parametrize("role", ["query", "document"])
def test_token_vectors(families: Api, role: str) -> None:
    answer = families.embed(TEXTS, model=COLBERT, input_type=role, embedding_type="ubinary")
    assert answer.status == 200, answer.json
    encoder = network(families, COLBERT)
    tokenizer = encoder.query_tokenizer if role == "query" else encoder.tokenizer
    wanted = encoder.forward([EncodeItem(each.ids) for each in tokenizer.encode_batch(TEXTS)])
    for item, expected in zip(answer.json["data"], wanted, strict=True):
        assert item["object"] == "embeddings"
        assert np.array(item["embeddings"]).shape == (len(np.asarray(expected)), 16)


def test_token_vectors_over_grpc(families: Api) -> None:
    address = f"{families.stack.host}:{families.stack.grpc_port}"
    with grpc.insecure_channel(address) as channel:
        request = embed_pb2.EmbedRequest(
            model=COLBERT,
            inputs=[common_pb2.Content(text="hello world")],
            options=embed_pb2.EmbedOptions(role=common_pb2.INPUT_ROLE_QUERY),
        )
        metadata = (("authorization", f"Bearer {families.key}"), ("x-model", COLBERT))
        answer = embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, metadata=metadata, timeout=20)
    assert len(answer.embeddings[0].multi.vectors) == 32


def test_sparse_vectors(families: Api) -> None:
    answer = families.embed(["hello world", "the fox"], model=ELSER)
    assert answer.status == 200, answer.json
    for item in answer.json["data"]:
        assert item["object"] == "embedding"
        weights = list(item["embedding"].values())
        assert weights == sorted(weights, reverse=True)
        assert min(weights) > 0
    assert answer.json["usage"].keys() == {"total_tokens", "input_tokens", "output_tokens"}


@pytest.mark.parametrize("model", RERANKERS)
def test_the_order_of_documents_is_the_references(families: Api, model: str) -> None:
    answer = families.rerank("hello fox", TEXTS, model=model, return_documents=False)
    assert answer.status == 200, answer.json
    scores = reference_scores(families, model, "hello fox")
    order = sorted(range(len(TEXTS)), key=lambda i: -scores[i])
    assert [result["index"] for result in answer.json["results"]] == order
    found = [result["relevance_score"] for result in answer.json["results"]]
    assert found == pytest.approx([scores[i] for i in order], abs=1e-4)


def reference_scores(api: Api, model: str, query: str) -> list[float]:
    if model == COLBERT:
        encoder = network(api, model)
        (asked,) = encoder.query_tokenizer.encode_batch([query])
        documents = encoder.tokenizer.encode_batch(TEXTS)
        rows = encoder.forward([EncodeItem(each.ids) for each in (asked, *documents)])
        first, *rest = [np.asarray(r) / np.linalg.norm(np.asarray(r), axis=1, keepdims=True) for r in rows]
        return [float((first @ each.T).max(1).sum()) for each in rest]
    spec = Catalog.load().require(model)
    encoder = load_cross_encoder(spec, folder_of(api, model), device=CPU, dtype=torch.float32)
    pairs = encoder.tokenizer.pairs(encoder.tokenizer.query(query), TEXTS)
    return encoder.forward([EncodeItem(pair.windows[0]) for pair in pairs])


def test_a_document_longer_than_the_rerankers_context(families: Api) -> None:
    model = "jina-reranker-v2-base-multilingual"
    answer = families.rerank("hello", ["hello world " * 1500, "fox"], model=model, truncation=False)
    assert answer.status == 200, answer.json
    assert answer.json["usage"]["total_tokens"] > 3000


def test_zero_shot_with_an_adapter(families: Api) -> None:
    answer = families.classify(model=V3, labels=["a dog", "the fox", "hello world"])
    assert answer.status == 200, answer.json
    assert sum(each["score"] for each in answer.json["data"][0]["predictions"]) == pytest.approx(1, abs=1e-4)


def test_the_list_of_models(families: Api) -> None:
    answer = get(families.stack.http_port, "/v1/models")
    assert {entry["id"].rpartition("/")[2] for entry in answer.json["data"]} == set(MODELS)

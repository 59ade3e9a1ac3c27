"""Models that are loaded when they are called, through the gateway and gRPC, with memory for half of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine, finish
from services.core.inference.loading import model_weight_bytes
from services.core.settings import Settings
from tests.decoder_checkpoints import write_served
from tests.e2e.conftest import Api
from tests.e2e.test_faults import metric
from tests.gateway.client import Answer, call, get
from tests.stack import Stack, wait_for
from tests.tiny import NAMES, write_catalog, write_weights

RERANKER = "jina-reranker-v3"
MODELS = (*NAMES, RERANKER)
ONE, TWO, THREE = NAMES
TEXTS = ["hello world", "the quick brown fox", "a lazy dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_catalog(folder)
    write_weights(folder)
    write_served(folder, RERANKER)
    return folder


@pytest.fixture(scope="module")
def wanted(models: Path) -> dict[str, np.ndarray]:
    """Vectors of ``TEXTS`` from an engine that keeps its models."""
    settings = Settings(models=NAMES, model_dir=models, dtype="float32", device="cpu")

    async def vectors() -> dict[str, np.ndarray]:
        engine = await Engine.start(settings, Catalog.load(models / "catalog.yaml"))
        try:
            return {
                name: finish((await engine.embedder(name).embed(TEXTS, EmbedOptions(), Call("x"))).vectors)
                for name in NAMES
            }
        finally:
            await engine.stop(5.0)

    return asyncio.run(vectors())


@pytest.fixture(scope="module")
def api(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    catalog = Catalog.load(models / "catalog.yaml")
    chosen = Settings(model_dir=models, dtype="float32")
    tiny, ranker = (
        model_weight_bytes(catalog.require(m), chosen, torch.device("cpu")) for m in (ONE, RERANKER)
    )
    settings = {
        "SF_DTYPE": "float32",
        "SF_MODEL_DIR": str(models),
        "SF_CATALOG_FILE": str(models / "catalog.yaml"),
        "SF_MODEL_RESIDENCY": "lazy",
        "SF_DEVICE_MEMORY_BYTES": str(max(2 * tiny, ranker + tiny)),
    }
    with Stack(tmp_path_factory.mktemp("lazy"), settings) as stack:
        stack.serve("embed", "rerank", "classify", "batch", models=MODELS)
        stack.gateway()
        yield Api(stack, stack.create_key())


def figure(api: Api, name: str) -> float:
    return metric(api.stack.services[0].metrics_port, f"searchfoundation_model_{name}")


def vectors(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.json
    return np.array([item["embedding"] for item in answer.json["data"]])


def send_away(api: Api, *others: str) -> None:
    """Call others than a model until it has left."""
    for other in others:
        vectors(api.embed(model=other))


def test_all_are_listed_and_ready_before_any_is_loaded(api: Api) -> None:
    assert figure(api, "loads_total") == 0
    listed = {item["id"] for item in get(api.stack.http_port, "/v1/models").json["data"]}
    assert listed == {*NAMES, f"jina-ai/{RERANKER}"}
    for path in ("/health", "/ready", "/live"):
        assert get(api.stack.http_port, path).status == 200


@pytest.mark.parametrize("model", NAMES)
def test_both_doors_answer_as_if_all_were_in_memory(
    api: Api, wanted: dict[str, np.ndarray], model: str
) -> None:
    np.testing.assert_allclose(vectors(api.embed(TEXTS, model=model)), wanted[model], atol=1e-5)
    send_away(api, *(name for name in NAMES if name != model))
    metadata = list(api.authorization.items())
    port = api.stack.services[0].grpc_port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        inputs = [common_pb2.Content(text=text) for text in TEXTS]
        request = embed_pb2.EmbedRequest(model=model, inputs=inputs)
        answer = stub.Embed(request, metadata=metadata, timeout=100)
        found = [item.dense.values for item in answer.embeddings]
        np.testing.assert_allclose(np.array(found), wanted[model], atol=1e-5)
        send_away(api, *(name for name in NAMES if name != model))
        messages = [
            embed_pb2.EmbedStreamRequest(model=model, input=common_pb2.Content(text=text)) for text in TEXTS
        ]
        streamed = list(stub.EmbedStream(iter(messages), metadata=metadata, timeout=100))
        found = [item.result.embeddings[0].dense.values for item in streamed]
        np.testing.assert_allclose(np.array(found), wanted[model], atol=1e-5)
    assert figure(api, "resident") <= 2
    assert figure(api, "unloads_total") > 0


def test_reranking_and_classifying_load_what_they_need(api: Api, wanted: dict[str, np.ndarray]) -> None:
    cosines = wanted[TWO][1:] @ wanted[TWO][0]
    for _ in range(2):
        results = api.rerank(TEXTS[0], TEXTS[1:], model=TWO).json["results"]
        assert {r["index"]: pytest.approx(r["relevance_score"], abs=1e-5) for r in results} == dict(
            enumerate(cosines.tolist())
        )
        ranked = api.rerank(TEXTS[0], TEXTS[1:], model=RERANKER)
        assert ranked.status == 200, ranked.json
        assert figure(api, "resident") <= 2
        answer = api.classify(model=THREE, input=TEXTS, labels=["a fox", "a dog"])
        assert answer.status == 200, answer.json
    labels = [{"text": text, "label": text[-3:]} for text in TEXTS]
    trained = api.train(model=ONE, input=labels)
    assert trained.status == 200, trained.json
    classifier = trained.json["classifier_id"]
    send_away(api, TWO, THREE)
    answer = api.classify(classifier_id=classifier, input=TEXTS)
    assert [item["prediction"] for item in answer.json["data"]] == [text[-3:] for text in TEXTS]


def test_jobs_load_their_model(api: Api, wanted: dict[str, np.ndarray]) -> None:
    send_away(api, ONE, TWO)
    lines = [{"custom_id": str(i), "body": {"input": text}} for i, text in enumerate(TEXTS)]
    made = api.post({"model": THREE, "input": lines}, "/v1/batch/embeddings")
    job = made.json["batch_id"]

    def fetch(path: str) -> Answer:
        return call(api.stack.http_port, "GET", path, headers=api.authorization)

    wait_for(lambda: fetch(f"/v1/batch/{job}").json["status"] == "completed")
    output = [json.loads(line) for line in fetch(f"/v1/batch/{job}/output").body.splitlines()]
    found = {line["custom_id"]: _embedding(line) for line in output}
    np.testing.assert_allclose([found[str(i)] for i in range(len(TEXTS))], wanted[THREE], atol=1e-5)


def _embedding(line: Any) -> list[float]:
    return line["response"]["body"]["data"][0]["embedding"]


def test_a_model_without_weights_is_back_when_they_are(api: Api, models: Path) -> None:
    send_away(api, ONE, TWO)
    (models / THREE).rename(models / "away")
    refused = api.embed(model=THREE)
    assert refused.error() == (503, "SERVICE_UNAVAILABLE")
    assert int(refused.headers["retry-after"]) >= 1
    assert vectors(api.embed(model=ONE)).shape == (1, 32)
    assert get(api.stack.http_port, "/ready").status == 200
    (models / "away").rename(models / THREE)
    assert vectors(api.embed(model=THREE)).shape == (1, 32)
    assert figure(api, "load_failures_total") >= 1


def test_many_calls_at_once_get_the_vectors_of_their_model(api: Api, wanted: dict[str, np.ndarray]) -> None:
    def ask(place: int) -> tuple[str, np.ndarray]:
        name = NAMES[place % 3]
        return name, vectors(api.embed(TEXTS, model=name))

    with ThreadPoolExecutor(6) as pool:
        for name, found in pool.map(ask, range(60)):
            np.testing.assert_allclose(found, wanted[name], atol=1e-5)


def test_the_log_tells_what_came_and_went(api: Api) -> None:
    log = api.stack.services[0].command.text()
    assert f"{ONE} is ready on cpu after" in log
    assert f"{ONE} was unloaded for" in log

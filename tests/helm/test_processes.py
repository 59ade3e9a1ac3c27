"""The pods' own commands and environment, run as processes: they answer through the real Envoy."""

from __future__ import annotations

import re
import time
from pathlib import Path

import grpc
import pytest
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc

from tests import checkpoints
from tests.helm.certificates import Authority
from tests.helm.chart import render
from tests.helm.load import Load
from tests.helm.pods import Cluster, Pod, call, fetch, run_batch
from tests.helm.value_sets import RUNNING, SMALL_GATEWAY, pool, small
from tests.servers import shared_postgres, shared_redis

MINILM = "all-MiniLM-L6-v2"
TINY = {
    "id": "tiny",
    "name": "Tiny",
    "owner": "tests",
    "family": "bert",
    "licence": "Apache-2.0",
    "released": "2026-01-01",
    "description": "A network of the tests.",
    "capabilities": ["embed"],
    "modalities": ["text"],
    "outputs": ["dense"],
    "context_length": 64,
    "parameters": 20000,
    "dimensions": 32,
}

pytestmark = pytest.mark.timeout(180)


def _url(cluster: Cluster) -> str:
    return f"http://{cluster.pods['gateway'][0].address}:8080"


def test_probes_say_what_the_pods_are(cluster: Cluster) -> None:
    for pod in (*cluster.pods["text"], *cluster.pods["gateway"]):
        assert pod.ready()
        assert pod.live()


def test_the_test_pod_of_the_chart_passes(cluster: Cluster) -> None:
    assert cluster.run_test_pod().splitlines() == [
        "OK: batch by all-MiniLM-L6-v2 gave a job of 2 lines",
        "OK: classify by all-MiniLM-L6-v2 gave the right one of 2 labels",
        "OK: embed by all-MiniLM-L6-v2 gave 384 numbers for 4 tokens",
        "OK: rerank by all-MiniLM-L6-v2 gave the right one of 2 documents first",
    ]


def test_rest_asks_for_the_key_of_the_release(cluster: Cluster, key: str) -> None:
    body = {"model": MINILM, "input": ["a", "b"]}
    status, answer = call(f"{_url(cluster)}/v1/embeddings", body, {"Authorization": f"Bearer {key}"})
    assert status == 200
    assert [len(item["embedding"]) for item in answer["data"]] == [384, 384]
    assert call(f"{_url(cluster)}/v1/embeddings", body)[0] == 401


def test_documents_are_ranked(cluster: Cluster, key: str) -> None:
    body = {"model": MINILM, "query": "a small dog", "documents": ["a stock exchange", "a little puppy"]}
    status, answer = call(f"{_url(cluster)}/v1/rerank", body, {"Authorization": f"Bearer {key}"})
    assert status == 200, answer
    assert [result["index"] for result in answer["results"]] == [1, 0]


def test_texts_are_classified(cluster: Cluster, key: str) -> None:
    body = {"model": MINILM, "input": ["the stock market fell"], "labels": ["finance", "cooking"]}
    status, answer = call(f"{_url(cluster)}/v1/classify", body, {"Authorization": f"Bearer {key}"})
    assert (status, answer["data"][0]["prediction"]) == (200, "finance"), answer


def test_a_batch_job_is_worked_off(cluster: Cluster, key: str) -> None:
    lines = run_batch(_url(cluster), {"Authorization": f"Bearer {key}"})
    assert lines == [f"line-{i}" for i in range(5)]


def test_the_grpc_port_answers_typed_calls(cluster: Cluster, key: str) -> None:
    with grpc.insecure_channel(f"{cluster.pods['gateway'][0].address}:50051") as channel:
        vector = _embed(channel, MINILM, key)
    assert len(vector) == 384
    assert vector[0] == pytest.approx(-0.034478, abs=2e-3)


def test_the_gateway_knows_the_pools_models(cluster: Cluster) -> None:
    assert f'"{MINILM}"' in fetch(f"{_url(cluster)}/v1/models")
    assert '"status":"ok"' in fetch(f"{_url(cluster)}/ready")


def test_both_kinds_of_pods_are_scraped_where_the_chart_says(cluster: Cluster) -> None:
    assert "searchfoundation_requests_total" in fetch(
        f"http://{cluster.pods['text'][0].address}:9090/metrics"
    )
    gateway = fetch(f"http://{cluster.pods['gateway'][0].address}:9090/stats/prometheus")
    assert re.search(r'envoy_cluster_membership_healthy\{envoy_cluster_name="text"\} 2', gateway)


def test_draining_and_updating_each_pod_in_turn_loses_no_call(cluster: Cluster, key: str) -> None:
    header = {"Authorization": f"Bearer {key}"}
    many = {"model": MINILM, "input": ["a"] * 9}
    assert call(f"{_url(cluster)}/v1/embeddings", many, header)[0] == 200
    values = small(*RUNNING, settings={"max_items": 8})
    cluster.upgrade(render(values))
    with Load(f"{cluster.pods['gateway'][0].address}:8080", key) as load:
        for leaving in cluster.pods["text"]:
            assert leaving.stop() == 0
            load.wait_for(30)
            _restart(cluster, leaving)
        load.wait_for(30)
    assert load.failed == []
    assert call(f"{_url(cluster)}/v1/embeddings", many, header)[0] == 422


def test_a_killed_pod_loses_only_what_it_was_working_on(cluster: Cluster, key: str) -> None:
    dying = cluster.pods["text"][1]
    with Load(f"{cluster.pods['gateway'][0].address}:8080", key) as load:
        dying.kill()
        killed = time.monotonic()
        load.wait_for(60)
    assert [sent for sent in load.failed if sent.began > killed] == []
    assert len(load.failed) <= 6
    _restart(cluster, dying)


def test_a_restarted_pod_takes_calls_again(cluster: Cluster, key: str) -> None:
    _restart_needed = [
        p for p in cluster.pods["text"] if p.process is not None and p.process.poll() is not None
    ]
    assert _restart_needed == []
    with Load(f"{cluster.pods['gateway'][0].address}:8080", key) as load:
        load.wait_for(60)
    assert load.failed == []
    for pod in cluster.pods["text"]:
        assert _answered(pod) > 0


def test_a_drained_gateway_finishes_its_calls(cluster: Cluster, key: str) -> None:
    gateway = cluster.pods["gateway"][0]
    with Load(f"{gateway.address}:8080", key) as load:
        stopping = time.monotonic()
        assert gateway.stop() in (0, -15)
    # Those that began when its port was closed found nobody; in a cluster they go to another gateway.
    refused_after = stopping + SMALL_GATEWAY["drain"]["preStopSeconds"]
    assert [sent for sent in load.failed if sent.began < refused_after] == []
    _restart(cluster, gateway)


def test_pools_of_different_models_are_told_apart(tmp_path: Path) -> None:
    weights = checkpoints.write_bert(tmp_path / "weights" / "tiny").parent
    cache = {"type": "hostPath", "path": str(weights), "readOnly": True}
    values = small(
        pool("large"),
        pool("small", models=["tiny"], modelCache=cache),
        catalog={"models": [TINY], "aliases": {"company-embedder": "tiny"}},
        settings={"model_aliases": {"text-embedding-3-small": MINILM}},
        auth={"enabled": False},
    )
    with Cluster(render(values), tmp_path / "pods") as cluster:
        cluster.run()
        widths = {MINILM: 384, "tiny": 32, f"jina-ai/{MINILM}": 384}
        widths |= {"company-embedder": 32, "text-embedding-3-small": 384}
        for model, width in widths.items():
            status, answer = call(f"{_url(cluster)}/v1/embeddings", {"model": model, "input": "hello world"})
            assert status == 200, answer
            assert len(answer["data"][0]["embedding"]) == width
        with grpc.insecure_channel(f"{cluster.pods['gateway'][0].address}:50051") as channel:
            assert len(_embed(channel, MINILM)) == 384
            assert len(_embed(channel, "tiny")) == 32
            assert len(_embed(channel, "company-embedder")) == 32
        status, answer = call(f"{_url(cluster)}/v1/embeddings", {"model": "nope", "input": "a"})
        assert (status, answer["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
        assert _answered(cluster.pods["small"][0]) > 0
        models = fetch(f"{_url(cluster)}/v1/models")
        assert '"tiny"' in models
        assert f'"{MINILM}"' in models


def test_state_in_postgresql_and_redis(tmp_path: Path) -> None:
    secrets = {
        "pg": {"url": shared_postgres().url(shared_postgres().new_database())},
        "redis": {"url": shared_redis().url},
    }
    values = small(
        pool(replicas=2),
        database={"existingSecret": "pg"},
        redis={"existingSecret": "redis"},
        settings={
            "tiers": {"two-a-minute": {"requests_per_minute": 2}},
            "default_tier": "two-a-minute",
            # A Redis that answers late on a busy machine would have each replica count by itself.
            "redis_timeout_seconds": 60,
        },
    )
    with Cluster(render(values), tmp_path, secrets=secrets) as cluster:
        cluster.run()
        header = {"Authorization": f"Bearer {cluster.secret('bootstrap-key', 'api-key')}"}
        body = {"model": MINILM, "input": "a"}
        statuses = [call(f"{_url(cluster)}/v1/embeddings", body, header)[0] for _ in range(6)]
    # Both replicas count together, or four would have passed.
    assert sorted(statuses) == [200, 200, 429, 429, 429, 429]


def test_tls_outside_and_mutual_tls_inside(tmp_path: Path) -> None:
    authority = Authority()
    secrets = {
        "site": authority.secret("search.example.com"),
        "gateway-mtls": authority.secret("sf-search-foundation-gateway.search.svc.cluster.local"),
        "pool-mtls": authority.secret("sf-search-foundation-embed.search.svc.cluster.local"),
    }
    values = small(
        pool(),
        auth={"enabled": False},
        mtls={"enabled": True, "gatewaySecret": "gateway-mtls", "poolSecret": "pool-mtls"},
    )
    values["gateway"] = SMALL_GATEWAY | {"tls": {"enabled": True, "existingSecret": "site"}}
    with Cluster(render(values), tmp_path, secrets=secrets) as cluster:
        cluster.run()
        gateway, serving = cluster.pods["gateway"][0], cluster.pods["embed"][0]
        assert gateway.ready()
        assert serving.live()
        url = f"https://{gateway.address}:8080/v1/embeddings"
        assert call(url, {"model": MINILM, "input": "hello world"})[0] == 200
        trust = grpc.ssl_channel_credentials(secrets["site"]["ca.crt"].encode())
        name = [("grpc.ssl_target_name_override", "search.example.com")]
        with grpc.secure_channel(f"{gateway.address}:50051", trust, name) as channel:
            assert len(_embed(channel, MINILM)) == 384
        # Without a certificate of its own nobody gets in behind the gateway.
        name = [("grpc.ssl_target_name_override", "sf-search-foundation-embed.search.svc.cluster.local")]
        with (
            grpc.secure_channel(f"{serving.address}:50051", trust, name) as channel,
            pytest.raises(grpc.RpcError) as refused,
        ):
            _embed(channel, MINILM)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def _embed(channel: grpc.Channel, model: str, key: str | None = None) -> list[float]:
    request = embed_pb2.EmbedRequest(model=model, inputs=[common_pb2.Content(text="hello world")])
    metadata = [("x-model", model)]
    if key is not None:
        metadata.append(("authorization", f"Bearer {key}"))
    answer = embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, timeout=30, metadata=metadata)
    return list(answer.embeddings[0].dense.values)


def _restart(cluster: Cluster, pod: Pod) -> None:
    cluster.start(pod)
    cluster.wait_ready(pod)
    cluster.wait_healthy()


def _answered(pod: Pod) -> float:
    lines = fetch(f"http://{pod.address}:9090/metrics").splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("searchfoundation_requests_total")
    )

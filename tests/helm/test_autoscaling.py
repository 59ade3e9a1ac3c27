"""Scaling on queued work."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import create_engine, text

from services.batch.schema import State
from services.batch.tables import BATCH
from services.core.storage.migrations import apply
from tests.helm.chart import render
from tests.helm.value_sets import MONITORED, SETS, one_pool, pool


def _scaled(**over: Any) -> dict[str, Any]:
    return MONITORED | one_pool(autoscaling={"enabled": True, "minReplicas": 2, "maxReplicas": 6} | over)


@pytest.mark.parametrize("values", [SETS["keda"], SETS["hpa"]], ids=["keda", "hpa"])
def test_the_autoscaler_owns_the_number_of_pods(values: dict[str, Any]) -> None:
    assert "replicas" not in render(values).workload("embed")["spec"]


def test_keda_scales_on_the_queue_of_this_pool() -> None:
    scaled = render(_scaled(queueDepth=64)).one("ScaledObject", "embed")["spec"]
    assert scaled["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "sf-search-foundation-embed",
    }
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 6)
    (trigger,) = scaled["triggers"]
    assert trigger["type"] == "prometheus"
    assert trigger["metricType"] == "AverageValue"
    assert trigger["metadata"]["threshold"] == "64"
    assert trigger["metadata"]["query"] == (
        "sum(searchfoundation_queue_items"
        '{namespace="search",pod=~"sf-search-foundation-embed-[a-z0-9]+-[a-z0-9]{5}"})'
    )
    assert trigger["metadata"]["serverAddress"] == "http://prometheus-operated.monitoring.svc:9090"


def test_keda_may_have_to_say_who_it_is() -> None:
    asks = {"triggerAuthentication": "prometheus", "authModes": "bearer", "scrapedElsewhere": True}
    values = _scaled() | {"metrics": asks}
    (trigger,) = render(values).one("ScaledObject", "embed")["spec"]["triggers"]
    assert trigger["authenticationRef"] == {"name": "prometheus"}
    assert trigger["metadata"]["authModes"] == "bearer"


def test_the_queue_can_be_counted_in_tokens() -> None:
    release = render(_scaled(signal="tokens", queueDepth=65536))
    metadata = release.one("ScaledObject", "embed")["spec"]["triggers"][0]["metadata"]
    assert "searchfoundation_queue_tokens{" in metadata["query"]
    assert metadata["threshold"] == "65536"


def test_keda_holds_a_number_of_pods_when_it_is_blind() -> None:
    scaled = render(_scaled(fallback={"replicas": 3, "failureThreshold": 5})).one("ScaledObject", "embed")
    fallback = {"failureThreshold": 5, "replicas": 3, "behavior": "currentReplicasIfHigher"}
    assert scaled["spec"]["fallback"] == fallback


@pytest.mark.parametrize("name", ["keda", "batch-keda", "zero"])
def test_no_series_is_an_error_and_no_empty_queue(name: str) -> None:
    for scaled in render(SETS[name]).all("ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            if trigger["type"] == "prometheus":
                assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_a_pool_that_may_have_no_pods_is_woken_and_kept_awake_by_calls() -> None:
    scaled = render(SETS["zero"]).one("ScaledObject", "a")["spec"]
    assert scaled["minReplicaCount"] == 0
    queue, calls = (trigger["metadata"] for trigger in scaled["triggers"])
    assert queue["query"].endswith("or vector(0)"), "without pods there is no queue"
    for metric in ("upstream_cx_none_healthy", "upstream_rq_total"):
        assert (
            f'increase(envoy_cluster_{metric}{{namespace="search",envoy_cluster_name="a"}}[5m])'
            in calls["query"]
        )
    assert calls["activationThreshold"] == "0"


def test_a_batch_pool_sleeps_when_no_job_is_open() -> None:
    release = render(SETS["zero"])
    (jobs,) = [
        trigger
        for trigger in release.one("ScaledObject", "batch")["spec"]["triggers"]
        if trigger["type"] == "postgresql"
    ]
    (secret,) = release.one("TriggerAuthentication", "batch-jobs")["spec"]["secretTargetRef"]
    assert jobs["authenticationRef"]["name"] == "sf-search-foundation-batch-jobs"
    assert secret == {"parameter": "connection", "name": "pg", "key": "url"}
    query = text(jobs["metadata"]["query"])
    with create_engine("sqlite://").begin() as database:
        apply(database, [BATCH])
        assert database.execute(query).scalar() == 0
    with create_engine("sqlite://").begin() as database:
        database.execute(text("CREATE TABLE batch_jobs (state TEXT, total INT, completed INT, failed INT)"))
        row = text("INSERT INTO batch_jobs VALUES (:state, 10, 3, 1)")
        database.execute(row, [{"state": state.value} for state in State])
        assert database.execute(query).scalar() == 6 * len([state for state in State if not state.ended])


def test_it_grows_at_once_and_shrinks_slowly() -> None:
    keda = render(SETS["keda"]).one("ScaledObject", "embed")["spec"]
    hpa = render(SETS["hpa"]).one("HorizontalPodAutoscaler", "embed")["spec"]
    behavior = keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == hpa["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleUp"]["policies"] == [{"type": "Pods", "value": 4, "periodSeconds": 60}]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]


def test_the_plain_autoscaler_uses_the_pods_own_gauge() -> None:
    release = render(SETS["hpa"])
    assert not release.all("ScaledObject")
    hpa = release.one("HorizontalPodAutoscaler", "embed")["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (1, 5)
    (metric,) = hpa["metrics"]
    assert metric["pods"]["metric"]["name"] == "searchfoundation_queue_items"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "32"}


def test_further_triggers_are_passed_on() -> None:
    cron = {"type": "cron", "metadata": {"timezone": "UTC", "start": "0 8 * * *", "end": "0 18 * * *"}}
    scaled = render(_scaled(extraTriggers=[cron])).one("ScaledObject", "embed")
    assert [trigger["type"] for trigger in scaled["spec"]["triggers"]] == ["prometheus", "cron"]


def test_a_stateful_pool_is_scaled_as_what_it_is() -> None:
    scaling = {"enabled": True, "minReplicas": 1, "maxReplicas": 4}
    pools = [pool("batch", capability="batch", autoscaling=scaling)]
    values = MONITORED | SETS["batch-workers"] | {"pools": pools}
    scaled = render(values).one("ScaledObject", "batch")
    assert scaled["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"


def test_a_batch_pool_scales_on_the_backlog_in_the_database() -> None:
    scaled = render(SETS["batch-keda"]).one("ScaledObject", "batch")["spec"]
    (trigger,) = scaled["triggers"]
    # Every pod tells the whole backlog: a sum would count it once for each.
    assert trigger["metadata"]["query"] == (
        'max(searchfoundation_batch_backlog_lines{namespace="search",pod=~"sf-search-foundation-batch-[0-9]+"})'
    )
    assert trigger["metadata"]["threshold"] == "50000"
    assert trigger["metricType"] == "AverageValue"


def test_a_pool_that_answers_calls_and_works_off_jobs_scales_on_both() -> None:
    release = render(SETS["batch-hpa"])
    queue, backlog = release.one("HorizontalPodAutoscaler", "all")["spec"]["metrics"]
    assert queue["pods"]["metric"]["name"] == "searchfoundation_queue_items"
    assert backlog["object"]["metric"]["name"] == "searchfoundation_batch_backlog_lines"
    assert backlog["object"]["describedObject"]["name"] in {
        service["metadata"]["name"] for service in release.all("Service")
    }
    assert backlog["object"]["target"] == {"type": "AverageValue", "averageValue": "50000"}


def test_pools_of_one_release_scale_each_for_itself() -> None:
    release = render(
        MONITORED
        | {
            "poolDefaults": {"autoscaling": {"enabled": True, "minReplicas": 2}},
            "pools": [
                pool("a"),
                pool("b", models=["jina-embeddings-v3"], autoscaling={"maxReplicas": 9}),
                pool("c", models=["jina-embeddings-v4"], autoscaling={"enabled": False}, replicas=5),
            ],
        }
    )
    assert release.names("ScaledObject") == {"a", "b"}
    assert release.one("ScaledObject", "a")["spec"]["maxReplicaCount"] == 4
    assert release.one("ScaledObject", "b")["spec"]["maxReplicaCount"] == 9
    assert release.one("ScaledObject", "b")["spec"]["minReplicaCount"] == 2
    assert release.workload("c")["spec"]["replicas"] == 5


def test_the_gateway_scales_on_cpu() -> None:
    release = render(SETS["gateway-scaled"])
    hpa = release.one("HorizontalPodAutoscaler", "gateway")["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 8)
    assert hpa["metrics"][0]["resource"]["target"]["averageUtilization"] == 70
    assert "replicas" not in release.workload("gateway")["spec"]

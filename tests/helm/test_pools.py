"""One entry of `pools` and the objects it becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.core.settings import Settings
from tests.helm.chart import container, render
from tests.helm.value_sets import SETS, one_pool, pool

MINILM = "all-MiniLM-L6-v2"


def test_the_defaults_install_every_capability_there_is_a_model_for() -> None:
    release = render()
    assert release.names("Deployment") == {"gateway", "text"}
    assert release.names("StatefulSet") == {"classify", "batch"}
    assert release.serve("text")["args"] == ["serve", "embed", "rerank"]
    assert release.serve("classify")["args"] == ["serve", "classify"]
    assert release.serve("batch")["args"] == ["serve", "batch"]
    assert release.names("Secret") == {"bootstrap-key", "keys"}
    assert not release.all("ScaledObject")
    assert not release.all("Ingress")


def test_each_pool_gets_its_own_workload_service_and_configuration() -> None:
    release = render(SETS["every-capability"])
    pools = {"embed", "rerank", "classify", "batch"}
    assert release.names("Deployment") == {"gateway", "embed", "rerank"}
    assert release.names("StatefulSet") == {"classify", "batch"}
    assert release.names("Service") == pools | {"gateway", "gateway-metrics", "grpc"}
    assert release.names("ConfigMap") == pools | {"gateway"}
    assert release.names("NetworkPolicy") == pools | {"gateway"}


@pytest.mark.parametrize("capability", ["embed", "rerank", "classify", "batch"])
def test_probes_ask_for_the_capabilitys_own_health(capability: str) -> None:
    serve = render(one_pool(capability=capability)).serve("embed")
    service = f"searchfoundation.v1.{capability.title()}Service"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert serve[probe]["grpc"] == {"port": 50051, "service": service}


def test_a_pool_of_several_capabilities_is_asked_as_a_whole() -> None:
    serve = render(SETS["all-in-one"]).serve("embed")
    assert serve["readinessProbe"]["grpc"] == {"port": 50051}
    assert serve["args"] == ["serve", "embed", "rerank", "classify", "batch"]


def test_probes_wait_long_to_start_notice_fast_and_restart_late() -> None:
    serve = render(SETS["one-pool"]).serve("embed")
    startup, readiness, liveness = (serve[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 10
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
    assert liveness["timeoutSeconds"] > readiness["timeoutSeconds"]


def test_with_mtls_the_kubelet_asks_the_port_without_tls() -> None:
    serve = render(SETS["mtls-secrets"]).serve("text")
    assert serve["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
    assert serve["startupProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
    assert serve["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
    assert "grpc" not in serve["readinessProbe"]


def test_models_and_device_reach_the_service() -> None:
    release = render(SETS["two-models"])
    assert json.loads(release.environment("small")["SF_MODELS"]) == [MINILM]
    assert json.loads(release.environment("large")["SF_MODELS"]) == [
        "jina-embeddings-v3",
        "jina-embeddings-v2-base-en",
    ]
    assert release.environment("small")["SF_DEVICE"] == "cpu"
    assert render(SETS["gpu"]).environment("embed")["SF_DEVICE"] == "cuda"


def test_services_believe_the_gateways_pods_where_a_call_comes_from() -> None:
    release = render({"gateway": {"networks": ["10.4.0.0/14"]}})
    assert release.environment("classify")["SF_TRUSTED_PROXIES"] == '["10.4.0.0/14"]'
    private = json.loads(render().environment("text")["SF_TRUSTED_PROXIES"])
    assert Settings(trusted_proxies=private).trusted_proxies
    assert {"10.0.0.0/8", "192.168.0.0/16"} <= set(private)


def test_settings_of_a_pool_win_over_those_of_all() -> None:
    values: dict[str, Any] = {
        "settings": {"max_items": 1_000_000, "log_level": "warning", "dtype": "bfloat16"},
        "pools": [pool("a", settings={"dtype": "float32"}), pool("b", models=["jina-embeddings-v3"])],
    }
    release = render(values)
    assert release.environment("a")["SF_DTYPE"] == "float32"
    assert release.environment("b")["SF_DTYPE"] == "bfloat16"
    assert release.environment("b")["SF_MAX_ITEMS"] == "1000000"
    assert release.environment("a")["SF_LOG_LEVEL"] == "warning"


def test_settings_that_are_objects_and_truths_are_written_as_json() -> None:
    release = render({"settings": {"access_log": False, "tiers": {"gold": {"concurrency": 9}}}})
    environment = release.environment("text")
    assert environment["SF_ACCESS_LOG"] == "false"
    assert json.loads(environment["SF_TIERS"]) == {"gold": {"concurrency": 9}}


def test_gpu_pools_ask_for_gpus_and_tolerate_their_nodes() -> None:
    release = render(SETS["gpu"])
    pod = release.pod("embed")
    resources = release.serve("embed")["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == 2
    assert resources["requests"]["nvidia.com/gpu"] == 2
    assert resources["limits"]["memory"] == "2Gi"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
    assert pod["runtimeClassName"] == "nvidia"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert release.serve("embed")["image"] == "search-foundation:0.1.0-cuda"
    assert container(pod, "prefetch")["image"] == "search-foundation:0.1.0-cuda"
    assert "nvidia.com/gpu" not in json.dumps(container(pod, "prefetch")["resources"])


def test_a_slice_of_a_gpu_is_asked_for_by_its_name() -> None:
    limits = render(SETS["mig"]).serve("embed")["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == 1
    assert "nvidia.com/gpu" not in limits


def test_cpu_pools_ask_for_no_gpu() -> None:
    pod = render(SETS["one-pool"]).pod("embed")
    assert "nvidia" not in json.dumps(pod)
    assert "runtimeClassName" not in pod
    assert "tolerations" not in pod


@pytest.mark.parametrize("variable", ["SF_CORES", "OMP_NUM_THREADS"])
def test_the_pods_cores_are_counted_not_the_nodes(variable: str) -> None:
    entries = {entry["name"]: entry for entry in render(SETS["one-pool"]).serve("embed")["env"]}
    reference = entries[variable]["valueFrom"]["resourceFieldRef"]
    assert reference == {"containerName": "serve", "resource": "requests.cpu", "divisor": "1"}


def test_batch_workers_keep_their_names() -> None:
    release = render(SETS["batch-workers"])
    entries = {entry["name"]: entry for entry in release.serve("batch")["env"]}
    assert entries["POD_NAME"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert entries["SF_WORKER_ID"]["value"] == "$(POD_NAME).search"
    names = [entry["name"] for entry in release.serve("batch")["env"]]
    assert names.index("POD_NAME") < names.index("SF_WORKER_ID"), "only earlier variables are put in"
    assert "SF_WORKER_ID" not in str(render(SETS["one-pool"]).serve("embed"))


def test_webhooks_are_signed_with_the_sites_secret() -> None:
    entries = {entry["name"]: entry for entry in render(SETS["batch-keda"]).serve("batch")["env"]}
    reference = entries["SF_WEBHOOK_SECRET"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "hooks", "key": "secret"}
    assert "SF_WEBHOOK_SECRET" not in str(render(SETS["batch-workers"]).manifests)


def test_updates_never_take_a_pod_away_first() -> None:
    spec = render(SETS["replicas"]).workload("embed")["spec"]
    assert spec["replicas"] == 3
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert spec["progressDeadlineSeconds"] == 1200


def test_pods_leave_their_service_before_they_are_told_to_stop() -> None:
    release = render(one_pool(drain={"preStopSeconds": 20, "graceSeconds": 90}))
    assert release.serve("embed")["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert release.environment("embed")["SF_GRACE_SECONDS"] == "90"
    assert release.pod("embed")["terminationGracePeriodSeconds"] == 115


def test_a_change_of_configuration_restarts_the_pods_it_concerns() -> None:
    def checksum(values: dict[str, Any], workload: str) -> str:
        annotations = render(values).workload(workload)["spec"]["template"]["metadata"]["annotations"]
        return annotations["checksum/config"]

    before = {"pools": [pool("a"), pool("b", models=["jina-embeddings-v3"])]}
    after = {"pools": [pool("a", settings={"max_items": 7}), pool("b", models=["jina-embeddings-v3"])]}
    assert checksum(before, "a") != checksum(after, "a")
    assert checksum(before, "b") == checksum(after, "b")


def test_a_change_of_the_catalogue_restarts_the_pods() -> None:
    def checksum(alias: str) -> str:
        release = render({"catalog": {"aliases": {alias: MINILM}}})
        return release.workload("text")["spec"]["template"]["metadata"]["annotations"]["checksum/catalog"]

    assert checksum("one") != checksum("two")
    release = render(SETS["catalog"])
    assert release.environment("text")["SF_CATALOG_FILE"] == "/etc/search-foundation/catalog/catalog.yaml"
    assert "company-embedder: all-MiniLM-L6-v2" in release.one("ConfigMap", "catalog")["data"]["catalog.yaml"]


def test_pods_are_spread_over_zones_and_nodes() -> None:
    constraints = render(SETS["replicas"]).pod("embed")["topologySpreadConstraints"]
    assert [c["topologyKey"] for c in constraints] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    assert {c["whenUnsatisfiable"] for c in constraints} == {"ScheduleAnyway"}
    assert constraints[0]["labelSelector"]["matchLabels"]["search-foundation/pool"] == "embed"
    assert {tuple(c["matchLabelKeys"]) for c in constraints} == {("pod-template-hash",)}
    stateful = render(SETS["batch-workers"]).pod("batch")["topologySpreadConstraints"]
    assert not [c for c in stateful if "matchLabelKeys" in c], "pods of a StatefulSet have no such label"


def test_a_new_version_of_the_chart_alone_restarts_nothing() -> None:
    release = render()
    for name in ("text", "batch", "gateway"):
        assert "helm.sh/chart" not in release.workload(name)["spec"]["template"]["metadata"]["labels"]
        assert "helm.sh/chart" in release.workload(name)["metadata"]["labels"]


def test_placement_is_passed_on() -> None:
    pod = render(SETS["placement"]).pod("embed")
    assert pod["nodeSelector"] == {"disk": "fast"}
    assert pod["tolerations"] == [{"key": "search", "operator": "Exists"}]
    assert pod["priorityClassName"] == "high"
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert pod["schedulerName"] == "bin-packer"
    assert pod["dnsConfig"] == {"options": [{"name": "ndots", "value": "2"}]}
    assert pod["hostAliases"] == [{"ip": "10.1.2.3", "hostnames": ["hub.site.internal"]}]
    assert "topologySpreadConstraints" not in pod


def test_additions_of_the_operator_are_in_the_pod() -> None:
    release = render(SETS["extras"])
    pod = release.pod("embed")
    assert [c["name"] for c in pod["initContainers"]] == ["wait", "prefetch"]
    assert [c["name"] for c in pod["containers"]] == ["serve", "proxy"]
    for name in ("prefetch", "serve"):
        own = container(pod, name)
        assert {"name": "HTTPS_PROXY", "value": "http://proxy.site:3128"} in own["env"]
        assert {"name": "ca", "mountPath": "/etc/ssl/site"} in own["volumeMounts"]
    gateway = release.pod("gateway")
    assert [c["name"] for c in gateway["initContainers"]] == ["wait", "render"]
    assert [c["name"] for c in gateway["containers"]] == ["envoy", "follow", "proxy"]
    envoy = container(gateway, "envoy")
    assert {"name": "ENVOY_UID", "value": "0"} in envoy["env"]
    assert {"name": "ca", "mountPath": "/etc/ssl/site"} in envoy["volumeMounts"]
    assert "sf-own" in release.names("ConfigMap")
    assert "sf-own" in release.names("Secret")


def test_a_canary_has_an_image_of_its_own_and_a_share_of_the_calls() -> None:
    release = render(SETS["canary"] | {"image": {"digest": "sha256:" + "ab" * 32}})
    assert release.serve("canary")["image"] == "search-foundation:0.2.0"
    assert release.serve("stable")["image"].endswith("@sha256:" + "ab" * 32)
    assert {p["name"]: p["weight"] for p in release.topology()["pools"]} == {
        "stable": 95,
        "canary": 5,
        "spot": 0,
    }
    gpu = pool(device={"type": "gpu"}, image={"repository": "other/sf", "tag": "0.2.0"})
    assert render({"pools": [gpu]}).serve("embed")["image"] == "other/sf:0.2.0-cuda"


def test_a_budget_only_above_one_pod() -> None:
    assert release_budgets(one_pool()) == {"gateway"}
    assert release_budgets(one_pool(replicas=2)) == {"gateway", "embed"}
    assert release_budgets(one_pool(replicas=2, pdb={"enabled": False})) == {"gateway"}
    assert release_budgets(SETS["keda"]) == {"gateway", "embed"}
    assert release_budgets(SETS["hpa"]) == {"gateway"}
    assert release_budgets(SETS["gateway-single"]) == set()


def release_budgets(values: dict[str, Any]) -> set[str]:
    return render(values).names("PodDisruptionBudget")


def test_a_budget_lets_broken_pods_go() -> None:
    budget = render(SETS["replicas"]).one("PodDisruptionBudget", "embed")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_long_release_names_are_cut_and_stay_distinct() -> None:
    one = render(release="a-very-long-release-name-of-team-search-one")
    two = render(release="a-very-long-release-name-of-team-search-two")
    names = [{m["metadata"]["name"] for m in release.all("Service")} for release in (one, two)]
    assert not names[0] & names[1]
    assert max(len(name) for name in names[0] | names[1]) <= 51


def test_images_come_from_the_sites_registry() -> None:
    release = render(SETS["registry"])
    assert release.serve("text")["image"] == "registry.site.internal/mirror/search-foundation:0.1.0"
    assert (
        container(release.pod("redis"), "redis")["image"]
        == "registry.site.internal/mirror/redis:7.4.2-alpine"
    )
    assert release.pod("text")["imagePullSecrets"] == [{"name": "pull"}]
    named = render({"image": {"repository": "other.registry/sf"}, "global": {"imageRegistry": "mirror"}})
    assert named.serve("text")["image"] == "other.registry/sf:0.1.0"


def test_a_digest_wins_over_the_tag() -> None:
    image = render(SETS["digests"]).serve("text")["image"]
    assert image == "search-foundation@sha256:" + "ab" * 32
    gpu = render(SETS["digests"] | one_pool(device={"type": "gpu"})).serve("embed")["image"]
    assert gpu == "search-foundation@sha256:" + "ef" * 32

"""Where weights come from and where they are kept."""

from __future__ import annotations

from typing import Any

from tests.helm.chart import Manifest, Release, container, refusal, render
from tests.helm.value_sets import SETS, one_pool


def _volume(release: Release, pool: str, name: str) -> dict[str, Any]:
    (volume,) = [v for v in release.pod(pool)["volumes"] if v["name"] == name]
    return volume


def test_weights_are_fetched_before_serving_and_read_only_while_serving() -> None:
    release = render(SETS["one-pool"])
    prefetch = container(release.pod("embed"), "prefetch")
    assert prefetch["args"] == ["models", "pull", "--missing", "all-MiniLM-L6-v2"]
    assert {"name": "models", "mountPath": "/models"} in prefetch["volumeMounts"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in release.serve("embed")[
        "volumeMounts"
    ]
    assert release.environment("embed")["SF_MODEL_DIR"] == "/models"


def test_the_serving_container_is_offline_unless_told_otherwise() -> None:
    offline = {"name": "HF_HUB_OFFLINE", "value": "1"}
    release = render(SETS["one-pool"])
    assert offline in release.serve("embed")["env"]
    assert "env" not in container(release.pod("embed"), "prefetch")
    assert offline not in render(one_pool(offline=False)).serve("embed")["env"]


def test_without_prefetch_there_is_no_init_container() -> None:
    assert "initContainers" not in render(SETS["no-prefetch"]).pod("embed")


def test_licences_are_accepted_only_when_the_operator_says_so() -> None:
    assert "--accept-license" not in container(render(SETS["one-pool"]).pod("embed"), "prefetch")["args"]
    accepted = render(one_pool(prefetch={"acceptLicenses": True}, models=["jina-embeddings-v3"]))
    args = container(accepted.pod("embed"), "prefetch")["args"]
    assert args == ["models", "pull", "--missing", "--accept-license", "jina-embeddings-v3"]


def test_an_empty_dir_is_bounded() -> None:
    assert _volume(render(SETS["one-pool"]), "embed", "models")["emptyDir"] == {"sizeLimit": "20Gi"}


def test_a_claim_is_made_and_survives_an_uninstall() -> None:
    release = render(SETS["cache-pvc"])
    claim = release.one("PersistentVolumeClaim", "embed-models")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == "shared"
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    used = _volume(release, "embed", "models")["persistentVolumeClaim"]["claimName"]
    assert used == claim["metadata"]["name"]


def test_a_filled_claim_is_used_as_it_is() -> None:
    release = render(SETS["cache-claim"])
    assert not release.all("PersistentVolumeClaim")
    volume = _volume(release, "embed", "models")
    assert volume["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert "initContainers" not in release.pod("embed")


def test_a_folder_of_the_node_is_mounted() -> None:
    filled = _volume(render(SETS["cache-host"]), "embed", "models")["hostPath"]
    assert filled == {"path": "/var/models", "type": "Directory"}
    fetched = render(one_pool(modelCache={"type": "hostPath", "path": "/var/models"}))
    assert _volume(fetched, "embed", "models")["hostPath"]["type"] == "DirectoryOrCreate"


def test_the_hubs_token_reaches_only_the_prefetch() -> None:
    release = render(SETS["hub-mirror"])
    prefetch = container(release.pod("embed"), "prefetch")
    assert prefetch["env"] == [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    ]
    assert "HF_TOKEN" not in str(release.serve("embed"))
    assert release.environment("embed")["HF_ENDPOINT"] == "https://hub.site.internal:8443"


def test_writable_places_are_volumes() -> None:
    release = render(one_pool(shmSize="1Gi", tmpSize="3Gi"))
    assert _volume(release, "embed", "shm")["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert _volume(release, "embed", "tmp")["emptyDir"] == {"sizeLimit": "3Gi"}
    mounts = {m["mountPath"] for m in release.serve("embed")["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/var/lib/search-foundation", "/models"} <= mounts
    assert release.environment("embed")["HOME"] == "/tmp"


def test_pools_may_share_one_claim() -> None:
    release = render(SETS["cache-shared"])
    (claim,) = release.all("PersistentVolumeClaim")
    assert claim["metadata"]["name"] == "sf-search-foundation-models"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "90Gi"
    for name in ("a", "b"):
        (volume,) = [v for v in release.pod(name)["volumes"] if v["name"] == "models"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_weights_may_come_as_an_image() -> None:
    pod = render(SETS["cache-image"]).pod("embed")
    (volume,) = [v for v in pod["volumes"] if v["name"] == "models"]
    assert volume["image"] == {
        "reference": "registry.site.internal/weights:1",
        "pullPolicy": "IfNotPresent",
    }
    (mount,) = [m for m in container(pod, "serve")["volumeMounts"] if m["name"] == "models"]
    assert mount == {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "models"}
    assert "initContainers" not in pod, "there is nothing to fetch"


def test_a_job_fills_the_claim_that_pools_share_and_pods_wait_for_it() -> None:
    release = render(SETS["warm-up"])
    shared, own = sorted(release.all("Job"), key=lambda job: "-own-" in job["metadata"]["name"])
    assert shared["metadata"]["name"].startswith("sf-search-foundation-models-warm-up-")
    assert own["metadata"]["name"].startswith("sf-search-foundation-own-warm-up-")
    for job, claim, models in (
        (shared, "sf-search-foundation-models", ["small", "all-MiniLM-L6-v2", "jina-embeddings-v3"]),
        (own, "sf-search-foundation-own-models", ["jina-embeddings-v2-base-en"]),
    ):
        pod = job["spec"]["template"]["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": claim}
        assert claim in {manifest["metadata"]["name"] for manifest in release.all("PersistentVolumeClaim")}
        fetch = container(pod, "fetch")
        assert fetch["args"] == ["models", "pull", "--missing", *models]
        assert {"name": "models", "mountPath": "/models"} in fetch["volumeMounts"]
        assert "HF_TOKEN" in {entry["name"] for entry in fetch["env"]}
    aliases = {entry["name"]: entry.get("value") for entry in container(_pod(shared), "fetch")["env"]}
    assert aliases["SF_MODEL_ALIASES"] == '{"small":"all-MiniLM-L6-v2"}'
    prefetch = container(release.pod("b"), "prefetch")
    assert prefetch["args"] == ["models", "wait", "all-MiniLM-L6-v2"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in prefetch["volumeMounts"]
    assert "HF_TOKEN" not in str(release.pod("b"))


def test_a_daemon_set_fills_every_node_where_pods_of_the_pool_may_run() -> None:
    release = render(SETS["warm-up"])
    (daemons,) = release.all("DaemonSet")
    there, pods = _pod(daemons), release.pod("gpus")
    for part in ("nodeSelector", "tolerations"):
        assert there[part] == pods[part]
    assert there["volumes"][0] == pods["volumes"][0]
    assert container(there, "fetch")["args"][-1] == "jina-embeddings-v2-base-de"
    # Also the image is on the node then, and no GPU is asked for.
    assert {c["image"] for c in (container(there, "fetch"), container(there, "stay"))} == {
        container(pods, "serve")["image"]
    }
    assert "nvidia.com/gpu" not in str(container(there, "stay")["resources"])
    assert container(pods, "prefetch")["args"] == ["models", "wait", "jina-embeddings-v2-base-de"]


def test_another_list_of_models_is_another_job() -> None:
    def name(*models: str) -> str:
        cache = {"type": "pvc", "warmUp": {"enabled": True, "models": list(models)}}
        (job,) = render(one_pool(modelCache=cache)).all("Job")
        return job["metadata"]["name"]

    assert name() == name()
    assert name() != name("jina-embeddings-v3")


def test_pods_that_wait_reach_no_hub_and_what_fetches_does() -> None:
    release = render(SETS["warm-up"])
    internet = "0.0.0.0/0"
    assert internet not in str(release.one("NetworkPolicy", "b")["spec"])
    for name in ("models-warm-up", "gpus-warm-up", "own-warm-up"):
        policy = release.one("NetworkPolicy", name)["spec"]
        assert internet in str(policy["egress"])
        assert "ingress" not in policy
        assert policy["policyTypes"] == ["Ingress", "Egress"]
    mirrored = {"type": "pvc", "warmUp": {"enabled": True}}
    values = one_pool(modelCache=mirrored, prefetch={"hubEndpoint": "https://hub.site.internal:8443"})
    policy = render(values).one("NetworkPolicy", "embed-warm-up")["spec"]
    assert internet not in str(policy)
    assert {"ports": [{"port": 8443}]} in policy["egress"]


def test_what_cannot_be_warmed_is_refused() -> None:
    warm = {"enabled": True}
    for cache, why in (
        ({"type": "emptyDir"}, "needs type pvc or hostPath"),
        ({"type": "image", "image": "weights:1"}, "needs type pvc or hostPath"),
        ({"type": "hostPath", "path": "/m", "readOnly": True}, "and not readOnly"),
        ({"type": "pvc", "accessMode": "ReadWriteOnce"}, "use ReadWriteMany"),
    ):
        assert why in refusal(one_pool(modelCache={**cache, "warmUp": warm}))
    assert "warmUp" in refusal(one_pool(modelCache={"type": "pvc", "warmUp": {"enabled": "yes"}}))


def _pod(workload: Manifest) -> Manifest:
    return workload["spec"]["template"]["spec"]

"""Where weights come from and where they are kept."""

from __future__ import annotations

from typing import Any

from tests.helm.chart import Release, container, render
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

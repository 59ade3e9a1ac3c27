"""State: keys, PostgreSQL, Redis, the object store and the volumes of stateful pools."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.core.access.key_file import KeyFile
from services.core.access.keys import digest, key_of
from tests.helm.chart import Release, render
from tests.helm.value_sets import DIGEST, SETS, one_pool, pool


def _from_secret(release: Release, workload: str) -> dict[str, tuple[str, str]]:
    """Variables of the serving container that come from a Secret: its name and key."""
    references = {
        entry["name"]: entry["valueFrom"].get("secretKeyRef")
        for entry in release.serve(workload)["env"]
        if "valueFrom" in entry
    }
    return {name: (ref["name"], ref["key"]) for name, ref in references.items() if ref}


def _keys(release: Release, path: Path) -> KeyFile:
    path.write_text(release.one("Secret", "keys")["stringData"]["keys.yaml"], encoding="utf-8")
    return KeyFile(path, tiers=["unlimited", "tier1"], default_tier="unlimited", balances=False)


def test_a_first_install_makes_one_key_and_stores_its_digest(tmp_path: Path) -> None:
    release = render()
    key = release.one("Secret", "bootstrap-key")["stringData"]["api-key"]
    assert key_of(f"Bearer {key}") == key
    record = _keys(release, tmp_path / "keys.yaml").find(digest(key))
    assert record is not None
    assert record.id == "bootstrap"
    assert key not in release.one("Secret", "keys")["stringData"]["keys.yaml"]


def test_keys_of_the_operator_are_read_by_the_service(tmp_path: Path) -> None:
    release = render(SETS["keys"])
    assert release.names("Secret") == {"keys"}
    record = _keys(release, tmp_path / "keys.yaml").find(bytes.fromhex(DIGEST.removeprefix("sha256:")))
    assert record is not None
    assert (record.id, record.tier) == ("team-a", "tier1")


def test_keys_are_mounted_so_that_a_change_is_seen_without_a_restart() -> None:
    release = render(SETS["keys-secret"])
    assert not release.all("Secret")
    (volume,) = [v for v in release.pod("text")["volumes"] if v["name"] == "keys"]
    assert volume["secret"] == {"secretName": "keys"}
    (mount,) = [m for m in release.serve("text")["volumeMounts"] if m["name"] == "keys"]
    assert mount == {"name": "keys", "mountPath": "/etc/search-foundation/keys", "readOnly": True}
    assert release.environment("text")["SF_KEYS_FILE"] == "/etc/search-foundation/keys/keys.yaml"


def test_without_auth_there_are_no_keys() -> None:
    release = render(SETS["no-auth"])
    assert release.environment("text")["SF_AUTH"] == "false"
    assert "SF_KEYS_FILE" not in release.environment("text")
    assert not release.all("Secret")


def test_keys_may_live_in_the_database_alone() -> None:
    release = render({"auth": {"bootstrapKey": {"enabled": False}}, "database": {"existingSecret": "pg"}})
    assert "SF_KEYS_FILE" not in release.environment("text")
    assert release.environment("text")["SF_AUTH"] == "true"


def test_urls_of_stores_come_from_secrets() -> None:
    release = render(SETS["stores"])
    for workload in ("text", "classify", "batch"):
        assert _from_secret(release, workload) == {
            "SF_DATABASE_URL": ("pg", "url"),
            "SF_REDIS_URL": ("redis", "url"),
        }
        assert "SF_DATABASE_URL" not in release.environment(workload)


def test_the_key_of_a_url_can_be_named() -> None:
    assert _from_secret(render(SETS["batch-shared-claim"]), "batch")["SF_DATABASE_URL"] == ("pg", "dsn")


def test_stores_are_off_by_default() -> None:
    release = render()
    assert not {"redis", "postgresql"} & (release.names("Deployment") | release.names("StatefulSet"))
    assert _from_secret(release, "text") == {}


def test_evaluation_stores_are_wired_to_the_pools() -> None:
    release = render(SETS["evaluation-stores"])
    redis, postgresql = release.one("Secret", "redis"), release.one("Secret", "postgresql")
    password = redis["stringData"]["password"]
    host = "sf-search-foundation-redis.search.svc.cluster.local"
    assert redis["stringData"]["url"] == f"redis://:{password}@{host}:6379/0"
    assert f"requirepass {password}\n" in redis["stringData"]["redis.conf"]
    password = postgresql["stringData"]["password"]
    host = "sf-search-foundation-postgresql.search.svc.cluster.local"
    assert postgresql["stringData"]["url"] == (
        f"postgresql://search_foundation:{password}@{host}:5432/search_foundation"
    )
    assert _from_secret(release, "text") == {
        "SF_DATABASE_URL": (postgresql["metadata"]["name"], "url"),
        "SF_REDIS_URL": (redis["metadata"]["name"], "url"),
    }
    assert password not in str(release.pod("postgresql"))


def test_evaluation_stores_run_as_their_images_users() -> None:
    release = render(SETS["evaluation-stores"])
    context = release.pod("postgresql")["securityContext"]
    assert (context["runAsUser"], context["fsGroup"], context["runAsNonRoot"]) == (70, 70, True)
    assert release.pod("redis")["securityContext"]["runAsUser"] == 10001


def _data(release: Release, workload: str) -> Any:
    """Volume of a pool's data folder."""
    assert "volumeClaimTemplates" not in release.workload(workload)["spec"]
    (volume,) = [v for v in release.pod(workload)["volumes"] if v["name"] == "data"]
    return {key: value for key, value in volume.items() if key != "name"}


def test_a_batch_pool_keeps_its_files_on_a_volume() -> None:
    release = render(one_pool(capability="batch"))
    spec = release.workload("embed")["spec"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["serviceName"] == "sf-search-foundation-embed"
    claim = release.one("PersistentVolumeClaim", "embed-data")
    assert _data(release, "embed") == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert claim["spec"]["resources"]["requests"]["storage"] == "10Gi"
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_batch_pool_may_share_one_volume() -> None:
    release = render(SETS["batch-shared-claim"])
    assert _data(release, "batch") == {"persistentVolumeClaim": {"claimName": "shared"}}
    assert not release.all("PersistentVolumeClaim")


def test_persistence_can_be_given_up() -> None:
    release = render(SETS["no-persistence"])
    assert _data(release, "batch") == {"emptyDir": {}}
    assert not release.all("PersistentVolumeClaim")


@pytest.mark.parametrize(("database", "kind"), [("", "StatefulSet"), ("pg", "Deployment")])
def test_classifiers_need_a_volume_only_without_a_database(database: str, kind: str) -> None:
    values = one_pool(capability="classify") | {"database": {"existingSecret": database}}
    assert render(values).workload("embed")["kind"] == kind


def test_the_object_store_reaches_batch_pools_only() -> None:
    values: dict[str, Any] = SETS["batch-workers"] | {
        "pools": [pool(), pool("batch", capability="batch", replicas=3)]
    }
    release = render(values)
    assert release.environment("batch")["SF_OBJECT_STORE"] == "s3://bucket/batches"
    assert {"secretRef": {"name": "s3"}} in release.serve("batch")["envFrom"]
    assert "SF_OBJECT_STORE" not in release.environment("embed")
    assert "s3" not in str(release.serve("embed")["envFrom"])


def test_generated_secrets_differ_from_release_to_release() -> None:
    keys = {
        render(release=name).one("Secret", "bootstrap-key")["stringData"]["api-key"]
        for name in ("one", "two")
    }
    assert len({hashlib.sha256(key.encode()).hexdigest() for key in keys}) == 2


def test_keys_file_is_yaml_with_nothing_but_entries() -> None:
    document = yaml.safe_load(render(SETS["keys"]).one("Secret", "keys")["stringData"]["keys.yaml"])
    assert document == {"keys": SETS["keys"]["auth"]["keys"]}


def test_a_batch_pool_whose_state_is_elsewhere_has_names_but_no_volumes() -> None:
    release = render(SETS["batch-workers"])
    assert release.names("StatefulSet") == {"batch"}
    assert _data(release, "batch") == {"emptyDir": {}}
    assert not release.all("PersistentVolumeClaim")

"""What an upgrade keeps and what it may not touch, whatever the values were and become."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helm.api_server import ApiServer
from tests.helm.chart import EXAMPLES, Manifest, RefusedError, Release, refusal, render
from tests.helm.value_sets import SETS, one_pool, pool

FULL = "sf-search-foundation"
EVALUATION: dict[str, Any] = {"evaluation": {"redis": {"enabled": True}, "postgresql": {"enabled": True}}}
STORES: dict[str, Any] = {"database": {"existingSecret": "pg"}, "objectStore": {"url": "s3://bucket/x"}}
CLAIM = {"type": "pvc", "size": "60Gi"}

# Of one name and pool, so that each pair is an upgrade somebody may do.
STEPS: dict[str, dict[str, Any]] = {
    "stores": STORES,
    "database": {"database": {"existingSecret": "pg"}},
    "larger": {"poolDefaults": {"persistence": {"size": "20Gi"}}},
    "other-class": {"poolDefaults": {"persistence": {"storageClassName": "fast"}}},
    "own-claim": {"poolDefaults": {"persistence": {"existingClaim": "mine"}}},
    "kept-in-memory": {"poolDefaults": {"persistence": {"enabled": False}}},
    "other-name-override": {"nameOverride": "foundation"},
    "balancer": {"gateway": {"service": {"type": "LoadBalancer"}}},
    "balancer-of-a-class": {
        "gateway": {"service": {"type": "LoadBalancer", "loadBalancerClass": "internal"}}
    },
    "cache": {"poolDefaults": {"modelCache": CLAIM}},
    "cache-grown": {"poolDefaults": {"modelCache": CLAIM | {"size": "80Gi"}}},
    "cache-of-a-class": {"poolDefaults": {"modelCache": CLAIM | {"storageClassName": "fast"}}},
    "evaluation-grown": {"evaluation": {"postgresql": {"enabled": True, "size": "50Gi"}}},
    "evaluation-of-a-class": {"evaluation": {"postgresql": {"enabled": True, "storageClassName": "fast"}}},
}
EXPANDABLE: Manifest = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": "standard"},
    "allowVolumeExpansion": True,
}
_OF_STATEFUL_SET = {
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        yield running


def _releases() -> dict[str, tuple[Release, dict[str, Any]]]:
    """Every set of values and example, rendered once, with what renders it again."""
    found = {name: (render(values), {"values": values}) for name, values in (SETS | STEPS).items()}
    for path in EXAMPLES:
        found[path.stem] = (render(files=(path,)), {"values": {}, "files": (path,)})
    return found


def _frozen(manifest: Manifest) -> Any:
    """What Kubernetes refuses to change of an object, as API machinery's validation has it."""
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "StatefulSet":
            return {key: value for key, value in spec.items() if key not in _OF_STATEFUL_SET}
        case "Deployment" | "DaemonSet":
            return spec["selector"]
        case "Job":
            return spec["template"]
        case "PersistentVolumeClaim":
            return {key: value for key, value in spec.items() if key != "resources"}
        case "Service":
            return spec.get("clusterIP") == "None"
        case "RoleBinding":
            return manifest["roleRef"]
        case "Secret":
            return manifest.get("type")
        case _:
            return None


def _unchangeable(old: Manifest, new: Manifest) -> bool:
    """Whether the API server would refuse to turn one object into the other."""
    if _frozen(old) != _frozen(new):
        return True
    before, after = old.get("spec", {}), new.get("spec", {})
    if new["kind"] == "PersistentVolumeClaim":
        return _gibibytes(after) < _gibibytes(before)
    if new["kind"] == "Service" and before.get("type") == after.get("type") == "LoadBalancer":
        return before.get("loadBalancerClass") != after.get("loadBalancerClass")
    return False


def _gibibytes(claim: Manifest) -> int:
    size: str = claim["resources"]["requests"]["storage"]
    return int(size.removesuffix("Gi"))


def _by_name(release: Release) -> dict[tuple[str, str], Manifest]:
    hooks = "helm.sh/hook"
    return {
        (m["kind"], m["metadata"]["name"]): m
        for m in release.manifests
        if hooks not in m["metadata"].get("annotations", {})
    }


def test_every_upgrade_passes_or_is_refused_before_anything_is_changed(server: ApiServer) -> None:
    """Over all pairs of value sets: what the API server would refuse, the chart refuses or leaves."""
    releases = _releases()
    objects = {name: _by_name(release) for name, (release, _) in releases.items()}
    tried: set[str] = set()
    kinds: set[str] = set()
    for old, new in itertools.permutations(releases, 2):
        for key in objects[old].keys() & objects[new].keys():
            before, after = objects[old][key], objects[new][key]
            change = repr((key, before.get("spec"), after.get("spec")))
            if change in tried or not _unchangeable(before, after):
                continue
            tried.add(change)
            kinds.add(key[0])
            server.hold([*releases[old][0].manifests, EXPANDABLE])
            _refused_or_left(server, releases[new][1], before)
    assert kinds == {"PersistentVolumeClaim", "Service"}, "no workload may have a shape that values change"


def _refused_or_left(server: ApiServer, how: dict[str, Any], before: Manifest) -> None:
    name = before["metadata"]["name"]
    refused = ""
    try:
        after = _by_name(render(**how, flags=server.flags))[before["kind"], name]
    except RefusedError as error:
        refused = str(error)
    else:
        live = server.answers[_path(before)]
        assert not _unchangeable(live, after), f"{name} would be refused by the API server"
    if refused:
        assert name in refused
        assert "kubectl" in refused or "Set it to that" in refused


def _path(manifest: Manifest) -> str:
    plural = {"PersistentVolumeClaim": "persistentvolumeclaims", "Service": "services"}[manifest["kind"]]
    return f"/api/v1/namespaces/search/{plural}/{manifest['metadata']['name']}"


def test_a_claim_grows_where_its_class_lets_it(server: ApiServer) -> None:
    old = render({}).manifests
    server.hold([*old, EXPANDABLE])
    grown = render(STEPS["larger"], flags=server.flags).one("PersistentVolumeClaim", "batch-data")
    assert grown["spec"]["resources"]["requests"]["storage"] == "20Gi"
    assert grown["spec"]["storageClassName"] == "standard"
    server.hold([*old, EXPANDABLE | {"allowVolumeExpansion": False}])
    assert "does not allow expansion" in refusal(STEPS["larger"], flags=server.flags)
    unbound = [
        m | {"status": {"phase": "Pending"}} if m["kind"] == "PersistentVolumeClaim" else m for m in old
    ]
    server.hold([*unbound, EXPANDABLE])
    assert "not bound" in refusal(STEPS["larger"], flags=server.flags)


def test_sets_with_claim_templates_of_an_earlier_chart_are_refused_with_the_way_out(
    server: ApiServer,
) -> None:
    release = render(EVALUATION | {"pools": [pool("batch", capability="batch")]})
    for name in ("batch", "postgresql"):
        release.workload(name)["spec"]["volumeClaimTemplates"] = [{"metadata": {"name": "data"}}]
    server.hold(release.manifests)
    message = refusal(EVALUATION | {"pools": [pool("batch", capability="batch")]}, flags=server.flags)
    for name, at in (("batch", "persistence of the pool"), ("postgresql", "evaluation.postgresql")):
        assert f"kubectl --namespace search delete statefulset {FULL}-{name} --cascade=orphan" in message
        assert f"existingClaim: data-{FULL}-{name}-0 under {at}" in message


def test_a_selector_of_another_chart_is_refused_with_the_way_out(server: ApiServer) -> None:
    release = render(one_pool())
    release.workload("embed")["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] = "renamed"
    server.hold(release.manifests)
    message = refusal(one_pool(), flags=server.flags)
    assert f"kubectl --namespace search delete deployment {FULL}-embed --cascade=orphan" in message
    assert f"{FULL}-gateway" not in message


def test_an_upgrade_keeps_the_key_and_the_passwords(server: ApiServer) -> None:
    first = render(EVALUATION).all("Secret")
    names = {f"{FULL}-{name}" for name in ("bootstrap-key", "keys", "redis", "postgresql")}
    assert {secret["metadata"]["name"] for secret in first} == names
    server.hold(first)
    assert render(EVALUATION, flags=server.flags).all("Secret") == first


def test_without_a_cluster_to_ask_they_are_new(server: ApiServer) -> None:
    server.hold(())
    first, second = (render(EVALUATION, flags=server.flags) for _ in range(2))
    for name, key in (("bootstrap-key", "api-key"), ("redis", "password"), ("postgresql", "password")):
        assert first.one("Secret", name)["stringData"][key] != second.one("Secret", name)["stringData"][key]

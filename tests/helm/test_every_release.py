"""Rules that hold for whatever values are given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate import utils

from gateway.topology import parse
from search_foundation.capabilities import implemented
from services.core.settings import Settings
from tests.helm import custom_resources
from tests.helm.chart import EXAMPLES, WORKLOADS, Manifest, Release, defaults, render
from tests.helm.value_sets import SETS

VALIDATORS = Path(sys.prefix) / "node_modules"
KUBERNETES = ("1.27", "1.32", "1.37")
SECRETS = {
    "SF_DATABASE_URL": "postgresql://h/d",
    "SF_REDIS_URL": "redis://h",
    "SF_WEBHOOK_SECRET": "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
}
STANDARD_LABELS = {
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
}


@pytest.fixture(scope="module", autouse=True)
def _schemas_read_once() -> Any:
    original = utils.schema_contents
    utils.schema_contents = cache(original)
    yield
    utils.schema_contents = original


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_every_object(release: Release, version: str) -> None:
    for manifest in release.manifests:
        if manifest["kind"] in custom_resources.SPECS:
            custom_resources.validate(manifest)
        elif not (version == "1.27" and '"image": {' in json.dumps(manifest)):  # volumes of images came later
            _validate(json.dumps(manifest, sort_keys=True), version)


@cache
def _validate(manifest: str, version: str) -> None:
    """Ask the schemas of a version; many sets of values give the same object."""
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_validator_sees_a_wrong_object(version: str) -> None:
    wrong = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_every_custom_resource_is_made_by_some_values_and_its_check_sees_a_wrong_one() -> None:
    made: dict[str, Manifest] = {}
    for values in SETS.values():
        made |= {m["kind"]: m for m in render(values).manifests if m["kind"] in custom_resources.SPECS}
    assert made.keys() == custom_resources.SPECS.keys()
    for manifest in made.values():
        wrong = manifest | {"spec": manifest["spec"] | {"replica": 1}}
        with pytest.raises(jsonschema.ValidationError, match="replica"):
            custom_resources.validate(wrong)


def _refused_by_operators(manifests: list[Manifest]) -> str:
    """What validators generated from the operators' CRDs say; skips where they are not installed."""
    node = shutil.which("node")
    if node is None or not (VALIDATORS / "@kubernetes-models" / "cert-manager").is_dir():
        pytest.skip("needs node and the packages that scripts/install-clients brings")
    done = subprocess.run(
        [node, Path(__file__).with_name("operators.mjs"), VALIDATORS],
        input=json.dumps(manifests),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_operators_accept_every_custom_resource() -> None:
    releases = [*map(render, SETS.values()), *(render(files=(path,)) for path in EXAMPLES)]
    texts = {json.dumps(m, sort_keys=True) for release in releases for m in release.manifests}
    ours = [m for m in map(json.loads, sorted(texts)) if m["kind"] in custom_resources.SPECS]
    assert _refused_by_operators(ours) == ""
    for manifest in {m["kind"]: m for m in ours}.values():
        assert manifest["kind"] in _refused_by_operators([manifest | {"spec": "none"}])


def test_names_are_unique_and_short_enough(release: Release) -> None:
    names = Counter((m["kind"], m["metadata"]["name"]) for m in release.manifests)
    assert max(names.values()) == 1
    for kind, name in names:
        # The label of a StatefulSet's revision appends 11 characters to its name.
        assert len(name) <= (52 if kind == "StatefulSet" else 63)


def test_every_object_is_labelled_and_in_the_namespace(release: Release) -> None:
    for manifest in release.manifests:
        if manifest["metadata"]["name"].endswith("-own"):
            continue  # an extra object is the operator's
        assert manifest["metadata"]["namespace"] == "search"
        assert manifest["metadata"]["labels"].keys() >= STANDARD_LABELS


def test_selectors_find_their_pods_and_never_hold_what_changes(release: Release) -> None:
    for workload in [*release.all("Deployment"), *release.all("StatefulSet"), *release.all("DaemonSet")]:
        selector = workload["spec"]["selector"]["matchLabels"]
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert not selector.keys() & {"app.kubernetes.io/version", "helm.sh/chart", "cost-centre"}
    for kind, path in (("Service", ["selector"]), ("PodDisruptionBudget", ["selector", "matchLabels"])):
        for manifest in release.all(kind):
            assert len(_selected(release, _at(manifest["spec"], path))) == 1, manifest["metadata"]["name"]
    for policy in release.all("NetworkPolicy"):
        assert len(_selected(release, policy["spec"]["podSelector"]["matchLabels"])) == 1


def test_services_point_at_ports_their_pods_open(release: Release) -> None:
    for service in release.all("Service"):
        (workload,) = _selected(release, service["spec"]["selector"])
        opened = {
            port["name"]
            for container in workload["spec"]["template"]["spec"]["containers"]
            for port in container.get("ports", [])
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= opened


def test_pods_meet_the_restricted_standard(release: Release) -> None:
    for name, pod in release.pod_specs():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for container in _own_containers(pod):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}


def test_containers_state_what_they_need_and_name_a_fixed_image(release: Release) -> None:
    for _, pod in release.pod_specs():
        for container in _own_containers(pod):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert "cpu" not in container["resources"]["limits"]
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            assert tag
            assert tag != "latest"


def test_the_default_release_fits_a_laptop() -> None:
    """Also in the middle of an update, when each Deployment has a pod more."""
    release = defaults()
    cpu, memory = 0, 0
    for kind in ("Deployment", "StatefulSet"):
        for workload in release.all(kind):
            pods = workload["spec"]["replicas"] + (1 if kind == "Deployment" else 0)
            for container in workload["spec"]["template"]["spec"]["containers"]:
                requests = container["resources"]["requests"]
                cpu += pods * _milli(requests["cpu"])
                memory += pods * _mebibytes(requests["memory"])
    assert cpu < 2000
    assert memory < 2048
    assert len(release.all("PersistentVolumeClaim")) == 1


def _milli(cpu: str) -> int:
    return int(cpu.removesuffix("m")) if cpu.endswith("m") else 1000 * int(cpu)


def _mebibytes(memory: str) -> int:
    return int(memory.removesuffix("Mi")) if memory.endswith("Mi") else 1024 * int(memory.removesuffix("Gi"))


def test_every_mount_has_its_volume_and_every_volume_a_mount(release: Release) -> None:
    for workload in [workload for kind in WORKLOADS for workload in release.all(kind)]:
        pod = workload["spec"]["template"]["spec"]
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        mounted = {
            mount["name"] for container in _containers(pod) for mount in container.get("volumeMounts", [])
        }
        assert mounted == volumes | claims
        assert not volumes & claims


def test_what_pods_refer_to_is_in_the_release_or_named_by_the_operator(release: Release) -> None:
    given = {"pg", "redis", "s3", "hub", "keys", "gw", "pools", "site-tls", "site-ca", "test-key", "hooks"}
    made = {(m["kind"], m["metadata"]["name"]) for m in release.manifests}
    made |= {("Secret", c["spec"]["secretName"]) for c in release.all("Certificate")}
    for name, pod in release.pod_specs():
        for kind, reference in _references(pod):
            known = (
                (kind, reference) in made or reference in given or reference.startswith("search-foundation-")
            )
            assert known, f"{name}: {kind} {reference}"


def test_pods_get_the_time_their_drain_takes(release: Release) -> None:
    for kind in ("Deployment", "StatefulSet"):
        for workload in release.all(kind):
            if workload["metadata"]["labels"]["app.kubernetes.io/component"] != "pool":
                continue
            pod = workload["spec"]["template"]["spec"]
            environment = _environment(release, pod)
            (serve,) = [c for c in pod["containers"] if c["name"] == "serve"]
            sleep = int(serve["lifecycle"]["preStop"]["exec"]["command"][1])
            assert pod["terminationGracePeriodSeconds"] == sleep + int(environment["SF_GRACE_SECONDS"]) + 5


def test_settings_are_those_of_the_services(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SF_")]:
        monkeypatch.delenv(name)
    for _, pod in release.pod_specs():
        arguments = pod["containers"][0].get("args", [])
        if arguments[:1] == ["serve"] and not set(arguments[1:]) <= set(map(str, implemented())):
            continue  # this version has no service whose settings these could be
        environment = _environment(release, pod)
        environment |= {name: text for name, text in SECRETS.items() if name in environment}
        ours = {name for name in environment if name.startswith("SF_")}
        assert ours <= {f"SF_{field.upper()}" for field in Settings.model_fields}
        with monkeypatch.context() as patch:
            for name in ours:
                patch.setenv(name, environment[name])
            Settings()


def test_the_gateway_understands_its_topology_and_finds_every_pool(release: Release) -> None:
    topology = parse(release.topology())
    pools = {
        m["metadata"]["labels"]["search-foundation/pool"]: m
        for kind in ("Deployment", "StatefulSet")
        for m in release.all(kind)
        if "search-foundation/pool" in m["metadata"]["labels"]
    }
    assert [pool.name for pool in topology.pools] == list(dict.fromkeys(pool.name for pool in topology.pools))
    assert {pool.name for pool in topology.pools} == pools.keys()
    for pool in topology.pools:
        if pool.service is not None:
            found = release.one("Service", pool.service.removesuffix(":50051"))
            assert _selected(release, found["spec"]["selector"]) == [pools[pool.name]]
            continue
        (address,) = pool.endpoints
        service, namespace, rest = address.host.split(".", 2)
        assert (namespace, rest, address.port) == ("search", "svc.cluster.local", 50051)
        headless = release.one("Service", service)
        assert headless["spec"]["clusterIP"] == "None"
        assert _selected(release, headless["spec"]["selector"]) == [pools[pool.name]]


def _selected(release: Release, labels: dict[str, str]) -> list[Manifest]:
    return [
        workload
        for kind in WORKLOADS
        for workload in release.all(kind)
        if labels.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def _at(part: Manifest, path: list[str]) -> dict[str, str]:
    for key in path:
        part = part[key]
    return part


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _own_containers(pod: Manifest) -> list[Manifest]:
    """Containers of the chart, without those an operator adds."""
    return [c for c in _containers(pod) if c["name"] not in ("wait", "proxy")]


def _environment(release: Release, pod: Manifest) -> dict[str, str]:
    """Variables of a pod's main container; values from Secrets are empty, shares of the pod 1."""
    found: dict[str, str] = {}
    container = pod["containers"][0]
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= release.one("ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", []):
        share = "resourceFieldRef" in entry.get("valueFrom", {})
        found[entry["name"]] = entry.get("value", "1" if share else "")
    return found


def _references(pod: Manifest) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            found.append(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            found.append(("Secret", volume["secret"]["secretName"]))
    for container in _containers(pod):
        for source in container.get("envFrom", []):
            kind = "ConfigMap" if "configMapRef" in source else "Secret"
            found.append((kind, next(iter(source.values()))["name"]))
        for entry in container.get("env", []):
            if "secretKeyRef" in entry.get("valueFrom", {}):
                found.append(("Secret", entry["valueFrom"]["secretKeyRef"]["name"]))
    return found

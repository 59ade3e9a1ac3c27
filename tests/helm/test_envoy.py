"""What the gateway's init container writes is loaded by the real Envoy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.build import envoy_yaml
from gateway.process import arguments
from gateway.topology import parse
from gateway.xds import BOOTSTRAP
from search_foundation.capabilities import implemented
from services.core.catalog import Catalog
from tests.helm.certificates import Authority
from tests.helm.chart import EXAMPLES, container, render
from tests.helm.value_sets import SETS

ENVOY = Path(sys.executable).parent / "envoy"
COMMAND = Path(sys.executable).parent / "search-foundation"
FOLDER = "/etc/search-foundation"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the gateway's TLS and mTLS mounts would hold."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority()
    for side in ("tls", "mtls"):
        (folder / side).mkdir()
        for name, text in authority.secret("gateway").items():
            (folder / side / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_rendered_configuration_of_every_example(path: Path, certificates: Path, tmp_path: Path) -> None:
    release = render(files=(path,))
    topology = _in(certificates, _served(release.topology()))
    config = release.one("ConfigMap", "gateway")["data"] | {"topology.yaml": yaml.safe_dump(topology)}
    for name, text in config.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    init = container(release.pod("gateway"), "render")

    def here(word: str) -> str:
        return word.replace(f"{FOLDER}/gateway", str(tmp_path)).replace(
            "/run/search-foundation", str(tmp_path)
        )

    words = list(map(here, init["args"]))
    environment = {entry["name"]: here(entry["value"]) for entry in init["env"]}
    environment["PATH"] = os.environ["PATH"]
    subprocess.run([COMMAND, *words], env=environment, check=True, timeout=180)
    _validate(tmp_path / "envoy.yaml")
    written = json.loads((tmp_path / "cds" / "clusters.json").read_text(encoding="utf-8"))
    clusters = {cluster["name"]: cluster for cluster in written["resources"]}
    for pool in topology["pools"]:
        assert clusters[pool["name"]]["type"] == "STRICT_DNS"
        assert clusters[pool["name"]]["health_checks"]


@pytest.mark.parametrize(
    "name",
    [
        "three-pools",
        "every-capability",
        "two-models",
        "tls-secret",
        "mtls-secrets",
        "no-grpc",
        "ipv6",
        "catalog",
        "settings",
    ],
)
def test_the_rendered_configuration_of_other_values(name: str, certificates: Path, tmp_path: Path) -> None:
    release = render(SETS[name])
    topology = parse(_in(certificates, _served(release.topology())))
    path = tmp_path / "envoy.yaml"
    path.write_text(envoy_yaml(topology, Catalog.load()), encoding="utf-8")
    _validate(path)


def test_envoy_refuses_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    path.write_text("static_resources: {listeners: [{name: x, adress: {}}]}", encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError):
        _validate(path)


def test_envoy_is_started_as_on_a_laptop() -> None:
    release = render({"gateway": {"concurrency": 3}})
    envoy = container(release.pod("gateway"), "envoy")
    assert envoy["command"] == ["envoy"]
    laptop = arguments(Path("/run/search-foundation") / BOOTSTRAP, parse(release.topology()))
    assert sorted(envoy["args"]) == sorted(laptop)
    assert envoy["args"][envoy["args"].index("--concurrency") + 1] == "3"


def test_the_drain_uses_the_port_and_times_of_the_pod() -> None:
    release = render({"gateway": {"drain": {"preStopSeconds": 7, "graceSeconds": 20}}})
    envoy = container(release.pod("gateway"), "envoy")
    assert envoy["lifecycle"]["preStop"]["exec"]["command"] == ["search-foundation", "gateway", "--drain"]
    environment = {entry["name"]: entry["value"] for entry in envoy["env"]}
    assert int(environment["SF_ADMIN_PORT"]) == release.topology()["admin"]["port"]
    assert environment["SF_DRAIN_SECONDS"] == "7"
    assert environment["SF_GRACE_SECONDS"] == "27"
    assert release.pod("gateway")["terminationGracePeriodSeconds"] == 32


def _validate(path: Path) -> None:
    command = [ENVOY, "--mode", "validate", "--config-path", path, "--log-level", "error"]
    subprocess.run(command, check=True, capture_output=True, timeout=180)


def _served(topology: dict[str, Any]) -> dict[str, Any]:
    """The topology without capabilities that this version has no service for."""
    served = set(map(str, implemented()))
    pools = [p | {"capabilities": [c for c in p["capabilities"] if c in served]} for p in topology["pools"]]
    return topology | {"pools": [pool for pool in pools if pool["capabilities"]]}


def _in(folder: Path, topology: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(topology).replace(f"{FOLDER}/", f"{folder}/"))

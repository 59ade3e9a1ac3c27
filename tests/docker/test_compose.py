"""The compose file for one host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.build import envoy_yaml
from gateway.topology import parse
from search_foundation.capabilities import implemented
from services.core.catalog import Catalog
from services.core.settings import Settings
from tests.helm.chart import CHART, REPOSITORY

FOLDER = REPOSITORY / "deploy" / "docker"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with the defaults of its variables filled in."""
    return _filled(yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8")))


def _filled(part: Any) -> Any:
    """Fill variables in as compose does: in the parsed document, where a text stays a text."""
    if isinstance(part, dict):
        return {key: _filled(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value) for value in part]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", part) if isinstance(part, str) else part


def test_containers_are_locked_down(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service["user"].startswith("0")
        assert ":" in service["image"]
        assert "latest" not in service["image"]
        assert service["healthcheck"]["test"][0] == "CMD"


def test_ports_are_open_on_this_host_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8080:8080", "127.0.0.1:50051:50051"]


def test_variables_are_settings(compose: dict[str, Any]) -> None:
    for name in ("services", "gateway"):
        given = {key for key in compose["services"][name]["environment"] if key.startswith("SF_")}
        assert given <= {f"SF_{field.upper()}" for field in Settings.model_fields}


def test_the_files_are_valid() -> None:
    files = sorted(FOLDER.glob("compose*.yaml"))
    assert len(files) == 2
    program = Path(sys.executable).parent / "check-jsonschema"
    subprocess.run([program, "--builtin-schema", "vendor.compose-spec", *files], check=True, timeout=60)


def test_the_validator_sees_a_wrong_file(tmp_path: Path) -> None:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8").replace("cap_drop:", "cap_drops:")
    (tmp_path / "compose.yaml").write_text(text, encoding="utf-8")
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [program, "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cap_drops" in done.stdout


def test_the_batch_worker_keeps_its_name(compose: dict[str, Any]) -> None:
    service = compose["services"]["services"]
    assert service["environment"]["SF_WORKER_ID"] == service["hostname"] == "services"


def test_containers_get_longer_than_their_grace(compose: dict[str, Any]) -> None:
    for name in ("services", "gateway"):
        service = compose["services"][name]
        assert int(service["stop_grace_period"].removesuffix("s")) > int(
            service["environment"]["SF_GRACE_SECONDS"]
        )


def test_the_gateway_renders_its_topology(compose: dict[str, Any]) -> None:
    topology = yaml.safe_load(compose["configs"]["topology"]["content"])
    served = compose["services"]["services"]
    (pool,) = topology["pools"]
    assert served["command"] == ["serve", *pool["capabilities"]]
    assert pool["models"] == json.loads(served["environment"]["SF_MODELS"])
    assert pool["addresses"] == ["services:50051"]
    pool["capabilities"] = [name for name in pool["capabilities"] if name in set(map(str, implemented()))]
    topology["admin"] = {"host": "127.0.0.1", "port": 9901}
    rendered = yaml.safe_load(envoy_yaml(parse(topology), Catalog.load()))
    assert "services" in [cluster["name"] for cluster in rendered["static_resources"]["clusters"]]


def test_the_images_are_those_of_the_chart(compose: dict[str, Any]) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert compose["services"]["services"]["image"] == f"search-foundation:{chart['appVersion']}"
    assert compose["services"]["redis"]["image"] == values["evaluation"]["redis"]["image"]


def test_the_gpu_file_adds_one_gpu() -> None:
    text = (FOLDER / "compose.gpu.yaml").read_text(encoding="utf-8")
    service = yaml.safe_load(text)["services"]["services"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert service["environment"] == {"SF_DEVICE": "cuda"}
    assert service["build"] == {"target": "cuda"}

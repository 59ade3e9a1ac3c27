"""What is made from values.yaml, the schema and the README's table, and what helm says of the chart."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm.chart import CHART, EXAMPLES, HELM, REPOSITORY
from tests.helm.value_sets import SETS

TOOL = REPOSITORY / "deploy" / "helm" / "tools" / "chart_docs.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_docs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chart_docs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def test_schema_and_readme_are_what_values_yaml_says(tool: ModuleType) -> None:
    for path, text in tool.outputs().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run {TOOL.name}"


def test_drift_is_noticed(tool: ModuleType, tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    values = chart / "values.yaml"
    text = values.read_text(encoding="utf-8")
    values.write_text(text.replace("maxReplicas: 4", "maxReplicas: 9"), encoding="utf-8")
    stale = [
        path.name for path, new in tool.outputs(chart).items() if path.read_text(encoding="utf-8") != new
    ]
    assert stale == ["README.md"]
    values.write_text(text.replace("maximum: 16}", "maximum: 32}"), encoding="utf-8")
    stale = [
        path.name for path, new in tool.outputs(chart).items() if path.read_text(encoding="utf-8") != new
    ]
    assert stale == ["values.schema.json"]


def test_a_key_without_description_is_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"values.yaml:3: a.c has no '# -- ' description"):
        tool.read_values("# -- Described.\na:\n  c: 1\n".replace("# -- Described.", "# Not."))


def test_the_schema_is_valid_and_closed(schema: dict[str, Any]) -> None:
    jsonschema.Draft7Validator.check_schema(schema)
    assert not list(_open_objects(schema, "values"))


def test_the_schema_knows_every_value(schema: dict[str, Any]) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    assert schema["properties"].keys() == values.keys()
    pool = schema["definitions"]["pool"]["properties"]
    assert pool.keys() == values["poolDefaults"].keys() | {"name", "capability", "models"}


def test_every_value_is_described_in_the_readme(tool: ModuleType) -> None:
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    leaves = [
        v for v in tool.read_values((CHART / "values.yaml").read_text(encoding="utf-8")) if v.description
    ]
    assert len(leaves) > 150
    for value in leaves:
        assert f"| `{'.'.join(value.path)}` |" in readme
        assert value.description.endswith(".")


def test_settings_of_the_services_are_all_allowed_or_set_by_the_chart(tool: ModuleType) -> None:
    from services.core.settings import Settings

    allowed = tool.schema(tool.read_values((CHART / "values.yaml").read_text(encoding="utf-8")))
    names = allowed["definitions"]["settings"]["properties"].keys()
    assert names | (tool.CHART_SETTINGS & Settings.model_fields.keys()) == Settings.model_fields.keys()
    assert not names & tool.CHART_SETTINGS


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_helm_lint_has_no_complaint(values: Path | None) -> None:
    _lint(["--values", str(values)] if values else [])


@pytest.mark.parametrize("name", ["every-capability", "extras", "observed", "zero"])
def test_helm_lint_has_no_complaint_about_a_value_set(name: str, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(SETS[name]), encoding="utf-8")
    _lint(["--values", str(path)])


def test_the_package_holds_what_an_install_needs(tmp_path: Path) -> None:
    subprocess.run(
        [HELM, "package", CHART, "--destination", tmp_path], check=True, capture_output=True, timeout=60
    )
    (package,) = tmp_path.glob("*.tgz")
    shutil.unpack_archive(package, tmp_path, "gztar")
    packed = tmp_path / "search-foundation"
    assert (packed / "values.schema.json").exists()
    assert (packed / "files" / "release_test.py").exists()
    assert not (packed / "examples").exists()
    for path in CHART.glob("templates/**/*"):
        assert (packed / path.relative_to(CHART)).exists()


def _lint(arguments: list[str]) -> None:
    done = subprocess.run(
        [HELM, "lint", "--strict", CHART, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def _open_objects(part: dict[str, Any], where: str) -> Any:
    """Objects of known properties that would let unknown ones through."""
    if (
        "properties" in part
        and part.get("additionalProperties") is not False
        and where != "definitions.named"
    ):
        yield where
    for key, value in part.items():
        if isinstance(value, dict):
            inner = key if key == "definitions" else f"{where}.{key}"
            yield from _open_objects(value, f"definitions.{key}" if where == "definitions" else inner)

"""What helm prints after an install."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, HELM
from tests.helm.value_sets import SETS, one_pool


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart with its notes as a template, since `helm template` leaves notes out."""
    copy = tmp_path_factory.mktemp("notes") / "chart"
    shutil.copytree(CHART, copy)
    notes = (copy / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    template = (
        f'{{{{- define "notes" -}}}}\n{notes}{{{{- end -}}}}\nnotes: {{{{ include "notes" . | quote }}}}\n'
    )
    (copy / "templates" / "notes.yaml").write_text(template, encoding="utf-8")
    return copy


def _notes(chart: Path, values: dict[str, Any]) -> str:
    command = [HELM, "template", "sf", chart, "--namespace", "search", "--show-only", "templates/notes.yaml"]
    done = subprocess.run(
        [*command, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return str(yaml.safe_load(done.stdout)["notes"])


def test_they_end_in_a_curl_with_a_key(chart: Path) -> None:
    notes = _notes(chart, {})
    assert "port-forward service/sf-search-foundation-gateway 8080:80" in notes
    assert "get secret sf-search-foundation-bootstrap-key" in notes
    assert "curl $URL/v1/embeddings" in notes
    assert '--header "Authorization: Bearer $KEY"' in notes
    assert '"model": "all-MiniLM-L6-v2"' in notes
    assert "helm test sf --namespace search" in notes
    assert "  all: embed, rerank, classify, batch with all-MiniLM-L6-v2 on cpu" in notes


def test_they_say_where_an_image_without_a_registry_comes_from(chart: Path) -> None:
    assert "kind load docker-image search-foundation:0.1.0" in _notes(chart, {})
    for repository in ("registry.site.internal/search-foundation", "localhost:5000/sf", "localhost/sf"):
        assert "names no registry" not in _notes(chart, {"image": {"repository": repository}})
    assert "names no registry" in _notes(chart, {"image": {"repository": "team/search-foundation"}})


def test_they_follow_the_way_in(chart: Path) -> None:
    assert "export URL=http://search.example.com" in _notes(chart, SETS["ingress"])
    assert "export URL=https://search.example.com" in _notes(chart, SETS["gateway-api"])
    balancer = _notes(chart, SETS["load-balancer"])
    assert "get service sf-search-foundation-gateway --output jsonpath" in balancer
    assert "https://127.0.0.1:8080" in _notes(chart, SETS["tls-secret"])


def test_they_warn_of_what_a_production_would_not_have(chart: Path) -> None:
    assert "auth.enabled is false" in _notes(chart, SETS["no-auth"])
    assert "Authorization" not in _notes(chart, SETS["no-auth"])
    assert "meant for trying things out" in _notes(chart, SETS["evaluation-stores"])
    assert "without Redis each pod counts" in _notes(chart, {})
    assert "without Redis" not in _notes(chart, SETS["stores"])
    assert "keeps its state on an emptyDir" in _notes(chart, SETS["no-persistence"])


def test_they_name_the_key_an_operator_made(chart: Path) -> None:
    notes = _notes(chart, SETS["keys"])
    assert "search-foundation keys create" in notes
    assert "helm test" not in notes


def test_without_embeddings_there_is_no_curl_to_print(chart: Path) -> None:
    assert "curl" not in _notes(chart, one_pool(capability="rerank"))

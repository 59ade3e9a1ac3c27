"""The pages for operators: their values are accepted, their links lead somewhere, their commands exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, REPOSITORY, render

DOCS = REPOSITORY / "docs"
PAGES = ("kubernetes", "sizing", "upgrade", "backup", "air-gapped", "multi-tenant", "migrations")


def _text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def _examples() -> list[Any]:
    found: list[Any] = []
    for page in PAGES:
        blocks = re.findall(r"```yaml\n# values\n(.*?)```", _text(page), re.DOTALL)
        found += [pytest.param(yaml.safe_load(b), id=f"{page}-{i}") for i, b in enumerate(blocks)]
    return found


@pytest.mark.parametrize("values", _examples())
def test_values_on_a_page_are_accepted(values: dict[str, Any]) -> None:
    release = render(values)
    assert release.topology()["pools"]


def test_there_are_values_to_try() -> None:
    assert len(_examples()) >= 7


@pytest.mark.parametrize(
    "path", [*(DOCS / f"{page}.md" for page in PAGES), CHART / "README.md"], ids=lambda p: p.stem
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_exist(page: str) -> None:
    for words in set(
        re.findall(r"search-foundation ((?:serve|gateway|keys|models|up)\b[^`\n|]*)", _text(page))
    ):
        command, *rest = words.replace("--", " --").split()
        help_text = _help(command)
        sub = [word for word in rest[:1] if re.fullmatch(r"[a-z][a-z-]+", word)]
        if command in ("keys", "models") and sub:
            assert sub[0] in help_text
            help_text = _help(command, *sub)
        for flag in re.findall(r"--[a-z-]+", words):
            assert flag in help_text, f"{words}: {flag}"


@cache
def _help(*command: str) -> str:
    program = Path(sys.executable).parent / "search-foundation"
    done = subprocess.run(
        [program, *command, "--help"], capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout


def test_memory_of_models_is_that_of_the_catalogue() -> None:
    path = REPOSITORY / "deploy" / "helm" / "tools" / "sizing.py"
    spec = importlib.util.spec_from_file_location("sizing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = _text("sizing")
    assert module.page(text) == text, "docs/sizing.md is stale: run deploy/helm/tools/sizing.py"

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

from tests.helm.chart import CHART, HELM, REPOSITORY, render

DOCS = REPOSITORY / "docs"
PAGES = ("kubernetes", "platforms", "sizing", "upgrade", "backup", "air-gapped", "multi-tenant", "migrations")


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


_HELM_VERBS = (
    "install",
    "upgrade",
    "template",
    "test",
    "rollback",
    "diff",
    "package",
    "push",
    "lint",
    "pull",
    "uninstall",
    "get",
)


def _commands(page: str, program: str) -> list[list[str]]:
    """Words of every command of a program on a page, in a block or in a line of text, each pipe by itself."""
    text = re.sub(r"\\\n\s*", " ", _text(page))
    found: list[list[str]] = []
    for code in (
        *re.findall(r"```sh\n(.*?)```", text, re.DOTALL),
        *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text),
    ):
        for line in code.splitlines():
            for part in re.split(r"\s\|\s|&&|\$\(", line.partition("  #")[0]):
                words = part.strip().split()
                if words[:1] == [program] and len(words) > 2:
                    found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_for_the_cluster_name_their_namespace(page: str) -> None:
    everywhere = {"get storageclass", "create namespace", "label namespace"}
    for words in _commands(page, "kubectl"):
        if " ".join(words[1:3]) not in everywhere:
            assert "--namespace" in words, " ".join(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_helm_are_those_of_helm(page: str) -> None:
    for words in _commands(page, "helm"):
        verb = words[1]
        assert verb in _HELM_VERBS, " ".join(words)
        if verb == "diff":
            continue  # a plugin
        text = _helm_help(verb)
        for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert flag in text, f"{' '.join(words)}: {flag}"
        if verb in ("install", "upgrade", "test", "rollback", "uninstall", "get"):
            assert "--namespace" in words, " ".join(words)
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        if sets:
            render(flags=tuple(x for one in sets for x in ("--set", one)))


def test_there_are_commands_to_try() -> None:
    assert sum(len(_commands(page, "kubectl")) for page in PAGES) > 8
    assert sum(len(_commands(page, "helm")) for page in PAGES) > 8


@pytest.mark.parametrize("page", PAGES)
def test_images_are_built_by_files_and_targets_that_exist(page: str) -> None:
    dockerfile = (REPOSITORY / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
    for words in _commands(page, "docker"):
        if "build" in words:
            assert f" AS {words[words.index('--target') + 1]}\n" in dockerfile
            assert (REPOSITORY / words[words.index("--file") + 1]).exists()
            assert "--tag" in words, "an image without a name is of no use"


@cache
def _helm_help(verb: str) -> str:
    return subprocess.run(
        [HELM, verb, "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout


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

"""``models check`` over a folder of each family of text networks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from search_foundation.commands.models_check import check
from services.core.catalog import Catalog
from services.core.settings import Settings
from tests import clip_checkpoints, omni_checkpoints, vision_checkpoints
from tests.text_checkpoints import FAMILIES, write_model


def checked(capsys: pytest.CaptureFixture[str], folder: Path, model: str | None = None) -> dict[str, Any]:
    arguments = argparse.Namespace(folder=str(folder), model=model, json=True)
    status = check(arguments, Settings(), Catalog.load())
    facts = json.loads(capsys.readouterr().out)
    assert status == (0 if facts["loads"] else 1)
    return facts


@pytest.mark.parametrize("model", FAMILIES)
def test_a_whole_folder_loads_and_one_that_lacks_a_tensor_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    folder = write_model(tmp_path, model)
    facts = checked(capsys, folder)
    assert (facts["model"], facts["loads"], facts["problems"]) == (model, True, [])
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    assert facts["tensors"] == len(tensors)
    lost = next(name for name in sorted(tensors) if name.endswith("bias") and "pooler" not in name)
    del tensors[lost]
    save_file(tensors, weights)
    (problem,) = checked(capsys, folder)["problems"]
    assert "missing tensors" in problem
    assert lost.removeprefix("bert.").removeprefix("roberta.") in problem


@pytest.mark.parametrize(
    ("model", "write"),
    [
        (clip_checkpoints.V1, clip_checkpoints.write_model),
        (clip_checkpoints.V2, clip_checkpoints.write_model),
        (vision_checkpoints.V4, vision_checkpoints.write_served),
        (vision_checkpoints.M0, vision_checkpoints.write_served),
        (omni_checkpoints.NANO, omni_checkpoints.write_served),
        (omni_checkpoints.SMALL, omni_checkpoints.write_served),
    ],
)
def test_towers_are_checked_as_one_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, write: Callable[[Path, str], Path]
) -> None:
    folder = write(tmp_path, model)
    facts = checked(capsys, folder)
    assert (facts["model"], facts["loads"], facts["problems"]) == (model, True, [])
    (folder / "preprocessor_config.json").unlink()
    (problem,) = checked(capsys, folder)["problems"]
    assert "preprocessor_config.json" in problem


@pytest.mark.parametrize("model", FAMILIES)
def test_no_folder_passes_for_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    folder = write_model(tmp_path, model)
    for other in (*FAMILIES, "all-MiniLM-L6-v2", "jina-clip-v2"):
        if other != model and not _same_network(model, other):
            assert not checked(capsys, folder, other)["loads"], other


def _same_network(one: str, other: str) -> bool:
    """The five v2 models differ in their tensors' names and sizes only, which the catalogue does not hold."""
    return one.startswith("jina-embeddings-v2") and other.startswith("jina-embeddings-v2")


def test_an_unnamed_folder_says_what_it_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path, "jina-embeddings-v3").rename(tmp_path / "download")
    (problem,) = checked(capsys, folder)["problems"]
    assert problem.endswith("it may be one of jina-embeddings-v3.")

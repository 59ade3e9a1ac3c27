"""Names, the operator's own entries, and aliases."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from services.core.catalog import Catalog, CatalogError

ENTRY = """
models:
  - id: our-encoder
    name: Our encoder
    owner: acme
    family: bert
    licence: Apache-2.0
    released: 2026-01-02
    description: An encoder of our own.
    capabilities: [embed]
    modalities: [text]
    outputs: [dense]
    context_length: 512
    parameters: 1000
    dimensions: 384
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "catalog.yaml"
    path.write_text(dedent(text))
    return path


@pytest.mark.parametrize(
    "name", ["jina-embeddings-v3", "jina-ai/jina-embeddings-v3", "jinaai/jina-embeddings-v3"]
)
def test_a_model_is_found_with_and_without_prefix(name: str) -> None:
    spec = Catalog.load().get(name)
    assert spec is not None
    assert spec.id == "jina-embeddings-v3"


@pytest.mark.parametrize("name", ["", "jina-ai/", "gpt-4", "other/jina-embeddings-v3", "JINA-EMBEDDINGS-V3"])
def test_other_names_are_no_models(name: str) -> None:
    assert Catalog.load().get(name) is None


def test_an_operators_entry_stands_beside_ours(tmp_path: Path) -> None:
    catalog = Catalog.load(write(tmp_path, ENTRY))
    assert catalog.require("our-encoder").dimensions == 384
    assert len(catalog.models) == len(Catalog.load().models) + 1


def test_an_operators_entry_replaces_ours_of_the_same_id(tmp_path: Path) -> None:
    catalog = Catalog.load(write(tmp_path, ENTRY.replace("our-encoder", "all-MiniLM-L6-v2")))
    assert catalog.require("all-MiniLM-L6-v2").owner == "acme"
    assert Catalog.load().require("all-MiniLM-L6-v2").owner == "sentence-transformers"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("dimensions: 384", "dimension: 384"), "model 'our-encoder': dimension: "),
        (("    licence: Apache-2.0\n", ""), "licence: field required"),
        (("family: bert", "family: berd"), "family: input should be 'bert'"),
        (("dimensions: 384", "dimensions: 0"), "dimensions must be positive"),
        (("context_length: 512", "context_length: 0"), "context_length must be at least 1"),
        (("context_length: 512", "context_length: many"), "context_length: input should be a valid integer"),
        (
            ("capabilities: [embed]", "capabilities: [embed, rerank]"),
            "capability rerank and the field rerank",
        ),
        (("modalities: [text]", "modalities: [text, image]"), "modality image and the field images"),
        (("dimensions: 384", "dimensions: 384\n    default_task: x"), "default_task names x"),
        (("dimensions: 384", "dimensions: 384\n    prompts: {q: 'Q: '}"), "prompts names q"),
        (("dimensions: 384", "dimensions: 384\n    revision: v1"), "revision must be a commit"),
        (("dimensions: 384", "dimensions: 384\n    dimension_choices: [64]"), "need matryoshka"),
        (
            ("dimensions: 384", "dimensions: 384\n    matryoshka: true\n    trained_dimensions: [512]"),
            "between 1 and 384",
        ),
        (("dimensions: 384", "dimensions: 384\n    alias_of: x"), "alias_of cannot be set"),
        (("id: our-encoder", "id: our/encoder"), "id may hold letters"),
        (("models:\n", "model:\n"), "unknown keys model; known are aliases, defaults, models"),
        (("models:\n", "models: 3\nx:\n"), "unknown keys x"),
    ],
)
def test_a_wrong_entry_is_refused_with_a_sentence(
    tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    assert change[0] in ENTRY
    path = write(tmp_path, ENTRY.replace(*change))
    with pytest.raises(CatalogError) as refused:
        Catalog.load(path)
    assert str(path) in str(refused.value)
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2]", "must be a mapping"),
        ("models: {a: 1}", "'models' must be a list"),
        ("models: [1]", "each entry of 'models' must be a mapping"),
        ("aliases: [a]", "'aliases' must be a mapping"),
        ("models: [", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_a_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(CatalogError, match=complaint):
        Catalog.load(write(tmp_path, text))


def test_an_id_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="our-encoder stands there more than once"):
        Catalog.load(write(tmp_path, ENTRY + ENTRY.replace("\nmodels:\n", "")))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No such file"):
        Catalog.load(tmp_path / "none.yaml")


def test_there_are_no_aliases_unless_the_operator_makes_them() -> None:
    assert not [spec.id for spec in Catalog.load().models.values() if spec.alias_of]


def test_an_alias_is_its_target_under_another_name(tmp_path: Path) -> None:
    path = write(tmp_path, "aliases: {from-file: jina-ai/jina-embeddings-v3}")
    catalog = Catalog.load(path, {"text-embedding-3-small": "all-MiniLM-L6-v2"})
    alias = catalog.require("text-embedding-3-small")
    assert (alias.id, alias.weights_id, alias.dimensions) == (
        "text-embedding-3-small",
        "all-MiniLM-L6-v2",
        384,
    )
    assert alias.public_id == "text-embedding-3-small"
    assert "Alias, set by the operator, of all-MiniLM-L6-v2" in alias.description
    assert catalog.require("from-file").weights_id == "jina-embeddings-v3"


@pytest.mark.parametrize(
    "aliases",
    [
        {"a": "unknown"},
        {"a": "b", "b": "all-MiniLM-L6-v2"},
        {"all-MiniLM-L6-v2": "all-MiniLM-L6-v2"},
        {" a": "elser-v2"},
        {"": "elser-v2"},
    ],
)
def test_a_senseless_alias_is_refused(aliases: dict[str, str]) -> None:
    with pytest.raises(CatalogError, match=r"[Aa]lias"):
        Catalog.load(None, aliases)


def test_selecting_a_model_selects_its_aliases_too() -> None:
    catalog = Catalog.load(None, {"one": "all-MiniLM-L6-v2", "other": "elser-v2"})
    assert [spec.id for spec in catalog.select(["all-MiniLM-L6-v2"])] == ["all-MiniLM-L6-v2", "one"]
    assert [spec.id for spec in catalog.select(["one"])] == ["one"]
    assert [spec.id for spec in catalog.select(["jina-ai/elser-v2", "elser-v2"])] == ["elser-v2", "other"]


def test_selecting_an_unknown_name_tells_the_known_ones() -> None:
    with pytest.raises(CatalogError, match=r"Unknown model 'nope'\. Known models: all-MiniLM-L6-v2, "):
        Catalog.load().select(["nope"])

"""The pages on models name every family and every model that can be loaded."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, Family
from tests.docs.examples import ROOT

BUILT = [spec for spec in Catalog.load().models.values() if spec.family.built]


def first_cells(page: str, heading: str) -> list[str]:
    """The names in the first column of the table under a heading: ``a, b-*`` gives two."""
    text = (ROOT / page).read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return [name.strip(" `") for row in rows[1:] for name in row.split(",")]


def test_every_family_has_its_row() -> None:
    assert set(first_cells("docs/models.md", "What a folder is checked against")) - {"---"} == {
        family.value for family in Family if family.built
    }


@pytest.mark.parametrize(
    ("heading", "does"),
    [
        ("Encoding", lambda spec: spec.supports(Capability.EMBED)),
        ("Scoring", lambda spec: spec.rerank is not None),
    ],
    ids=["encoding", "scoring"],
)
def test_what_comes_back_is_told_of_every_model(heading: str, does: object) -> None:
    assert callable(does)
    patterns = first_cells("docs/python.md", heading)
    missing = [spec.id for spec in BUILT if does(spec) and not any(fnmatchcase(spec.id, p) for p in patterns)]
    assert not missing

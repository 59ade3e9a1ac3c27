"""Clients that take long to install, or stand on other versions than those of ``make test``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import (
    FOLDER,
    TEXTS,
    Told,
    check,
    installed,
    pictures,
    ranking,
    refused,
    run,
    snippets,
    vectors,
)
from tests.docs.examples import Example
from tests.e2e.conftest import Api

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    # For the reranker of Milvus.
    pytest.mark.parametrize("api", [{"SF_RERANK_OBJECTS": "true"}], indirect=True, ids=["objects"]),
]

VECTORS = (
    "cohere embed",
    "chroma embed",
    "lance embed",
    "milvus embed",
    "lightrag embed",
    "mem0 embed",
    "agno embed",
)
PICTURES = ("chroma pictures", "lance pictures")
RANKINGS = ("cohere rerank", "lance rerank", "milvus rerank", "lightrag rerank", "rerankers rerank")
REFUSALS = (
    "cohere refused",
    "chroma refused",
    "lance refused",
    "milvus refused",
    "lightrag refused",
    "mem0 refused",
)
OTHERS = ("chroma collection",)
SNIPPETS = snippets("python", soak=True)


@pytest.fixture(scope="module")
def told(api: Api, picture: Path) -> Told:
    """What each call of ``soak_calls.py`` and each snippet of the documentation came to."""
    return run(api, picture, [installed("soak", "bin/python"), FOLDER / "soak_calls.py"], SNIPPETS)


def test_every_call_is_looked_at(told: Told) -> None:
    assert sorted(told) == sorted([*VECTORS, *PICTURES, *RANKINGS, *REFUSALS, *OTHERS, *map(str, SNIPPETS)])


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_ours(api: Api, told: Told, name: str) -> None:
    vectors(api, told, name)


@pytest.mark.parametrize("name", PICTURES)
def test_vectors_of_pictures_are_ours(api: Api, told: Told, name: str) -> None:
    pictures(api, told, name)


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_are_ours(api: Api, told: Told, name: str) -> None:
    ranking(api, told, name)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_shown(told: Told, name: str) -> None:
    # The quotes around the name are written with backslashes by one of them.
    refused(told, name, "not found. Available models")


def test_a_collection_finds_its_text(told: Told) -> None:
    assert told["chroma collection"] == (True, [[TEXTS[1]]])


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_snippets_print_what_the_page_shows(told: Told, snippet: Example) -> None:
    check(told, snippet)

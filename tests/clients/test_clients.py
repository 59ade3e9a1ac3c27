"""Real clients of other vendors against the real gateway.

They are not in the environment of the tests: ``make test`` builds them one of pinned versions first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.conftest import (
    FOLDER,
    TEXTS,
    Told,
    check,
    here,
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
from tests.stack import MODEL
from tests.vlm_served import PARROT, SAID

# The first run compiles what the clients import.
pytestmark = pytest.mark.timeout(1000)

NOT_FOUND = "Model 'nope' not found"

VECTORS: dict[str, dict[str, Any]] = {
    "openai embed": {},
    "openai embed short": {"dimensions": 8},
    "litellm embed as openai": {},
    "litellm embed as jina": {},
    "cohere embed float": {},
    "cohere embed v1": {},
    "cohere embed int8": {"embedding_type": "int8"},
    "voyage embed": {},
    "voyage embed int8": {"embedding_type": "int8", "dimensions": 8},
    "gemini embed": {},
    "ollama embed": {},
    "hugging face embed": {},
    "langchain openai embed": {},
    "langchain jina embed": {},
    "langchain cohere embed": {},
    "llama index openai embed": {},
    "llama index jina embed": {},
    "llama index tei embed": {},
    "haystack embed": {},
    "haystack embed query": {},
    "pydantic ai embed": {},
}
PICTURES = (
    "openai pictures",
    "cohere pictures",
    "voyage pictures",
    "langchain jina pictures",
    "llama index jina pictures",
    "haystack pictures",
)
RANKINGS = (
    "litellm rerank",
    "litellm rerank as cohere",
    "cohere rerank",
    "cohere rerank v1",
    "voyage rerank",
    "langchain jina rerank",
    "langchain cohere rerank",
    "llama index jina rerank",
    "llama index tei rerank",
    "haystack rerank",
)
ANSWERS = (
    *("litellm answer", "litellm stream", "litellm picture"),
    *("langchain openai answer", "langchain openai stream", "langchain openai picture"),
)
REFUSALS = {
    "openai refused": NOT_FOUND,
    "litellm refused": "temperature",
    "cohere refused": NOT_FOUND,
    "voyage refused": NOT_FOUND,
    "gemini refused": NOT_FOUND,
    "ollama refused": NOT_FOUND,
    "hugging face refused": "maximum of 512 tokens",
    "langchain openai refused": NOT_FOUND,
    "langchain openai answer refused": "temperature",
    "langchain jina refused": NOT_FOUND,
    "langchain cohere refused": NOT_FOUND,
    "llama index openai refused": NOT_FOUND,
    "llama index jina refused": NOT_FOUND,
    "haystack refused": NOT_FOUND,
    "pydantic ai refused": NOT_FOUND,
}
OTHERS = ("openai models", "ollama models", "llama index jina bits")
FOR_NODE = ("node openai", "ai-sdk")
SNIPPETS = snippets("python")


@pytest.fixture(scope="module")
def told(api: Api, picture: Path) -> Told:
    """What each call of ``calls.py`` and each snippet of the documentation came to."""
    return run(api, picture, [installed("make", "bin/python"), FOLDER / "calls.py"], SNIPPETS)


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder that has the clients for Node."""
    return installed("make", "node/node_modules") if shutil.which("node") else pytest.skip("needs node")


@pytest.fixture(scope="module")
def told_by_node(api: Api, picture: Path, modules: Path) -> Told:
    """What each call of ``calls.mjs`` came to."""
    return run(api, picture, ["node", FOLDER / "calls.mjs", modules])


def test_every_call_is_looked_at(told: Told) -> None:
    assert sorted(told) == sorted(
        [*VECTORS, *PICTURES, *RANKINGS, *ANSWERS, *REFUSALS, *OTHERS, *map(str, SNIPPETS)]
    )


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_ours(api: Api, told: Told, name: str) -> None:
    vectors(api, told, name, **VECTORS[name])


@pytest.mark.parametrize("name", PICTURES)
def test_vectors_of_pictures_are_ours(api: Api, told: Told, name: str) -> None:
    pictures(api, told, name)


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_are_ours(api: Api, told: Told, name: str) -> None:
    ranking(api, told, name)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_ours(told: Told, name: str) -> None:
    assert told[name] == (True, SAID)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_shown(told: Told, name: str) -> None:
    refused(told, name, REFUSALS[name])


def test_lists_of_models(told: Told) -> None:
    assert {MODEL, PARROT} < set(told["openai models"][1])
    assert MODEL in {name.removesuffix(":latest") for name in told["ollama models"][1]}


def test_llama_index_unpacks_bits(api: Api, told: Told) -> None:
    signs = np.array([item["embedding"] for item in api.embed(TEXTS).json["data"]]) > 0
    assert np.array_equal(np.array(told["llama index jina bits"][1], bool), signs)


@pytest.mark.parametrize("client", FOR_NODE)
def test_vectors_for_node_are_ours(api: Api, told_by_node: Told, client: str) -> None:
    vectors(api, told_by_node, f"{client} embed")


@pytest.mark.parametrize("client", FOR_NODE)
def test_refusals_are_shown_in_node(told_by_node: Told, client: str) -> None:
    refused(told_by_node, f"{client} refused", NOT_FOUND)


@pytest.mark.parametrize("name", ["node openai answer", "node openai stream"])
def test_answers_to_pictures_and_their_refusals_in_node(told_by_node: Told, name: str) -> None:
    assert told_by_node[name] == (True, SAID)
    refused(told_by_node, f"{name} refused", "temperature")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_snippets_print_what_the_page_shows(told: Told, snippet: Example) -> None:
    check(told, snippet)


@pytest.mark.parametrize("snippet", snippets("js"), ids=str)
def test_snippets_for_node_print_what_the_page_shows(api: Api, modules: Path, snippet: Example) -> None:
    done = subprocess.run(
        ["node", "--input-type=module", "-e", here(api, snippet)],
        env={**os.environ, "API_KEY": api.key},
        cwd=modules.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    snippet.check(done.stdout)

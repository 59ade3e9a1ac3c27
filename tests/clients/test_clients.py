"""Real clients of other vendors against the real gateway.

They live in ``.venv-clients``, which the first run builds from pinned versions; that takes a package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import Api
from tests.stack import MODEL, Stack
from tests.vlm_served import CACHE_BYTES, PARROT, SAID, write_answering

FOLDER = Path(__file__).parent
ENVIRONMENT = FOLDER.parents[1] / ".venv-clients"
TEXTS = ["a cat purrs", "rain"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has the clients, built anew when their versions change."""
    wanted, found = (FOLDER / "requirements.txt").read_text(), ENVIRONMENT / "requirements.txt"
    if not found.exists() or found.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        install = [
            ENVIRONMENT / "bin/pip",
            "install",
            "--quiet",
            "--requirement",
            FOLDER / "requirements.txt",
        ]
        subprocess.run(install, check=True)
        found.write_text(wanted)
    return ENVIRONMENT / "bin/python"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = write_answering(tmp_path_factory.mktemp("answering"))
    settings = {
        "SF_MODEL_DIR": str(folder),
        "SF_CATALOG_FILE": str(folder / "catalog.yaml"),
        "SF_CHAT_CACHE_BYTES": str(CACHE_BYTES),
    }
    with Stack(tmp_path_factory.mktemp("clients"), settings) as stack:
        stack.serve("embed", "rerank", "chat", models=(MODEL, PARROT))
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.fixture(scope="module")
def told(api: Api, python: Path) -> dict[str, tuple[bool, Any]]:
    """What each call of ``calls.py`` came to."""
    environment = {
        **os.environ,
        "BASE": api.stack.url,
        "API_KEY": api.key,
        "MODEL": MODEL,
        "CHAT_MODEL": PARROT,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        [python, FOLDER / "calls.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (answered, value) for name, answered, value in lines}


def ours(api: Api, **fields: Any) -> list[Any]:
    return [item["embedding"] for item in api.embed(TEXTS, **fields).json["data"]]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cohere embed float", {}),
        ("cohere embed v1", {}),
        ("cohere embed int8", {"embedding_type": "int8"}),
        ("voyage embed", {}),
        ("voyage embed int8", {"embedding_type": "int8", "dimensions": 8}),
        ("hugging face embed", {}),
    ],
)
def test_vectors_are_ours(
    api: Api, told: dict[str, tuple[bool, Any]], name: str, fields: dict[str, Any]
) -> None:
    answered, value = told[name]
    assert answered, value
    expected = np.asarray(ours(api, **fields))
    np.testing.assert_allclose(np.asarray(value), expected[: len(value)], rtol=1e-6)


@pytest.mark.parametrize("name", ["cohere rerank", "cohere rerank v1", "voyage rerank"])
def test_rankings_are_ours(api: Api, told: dict[str, tuple[bool, Any]], name: str) -> None:
    answered, value = told[name]
    assert answered, value
    results = api.rerank("feline", TEXTS).json["results"]
    assert value == [[each["index"], each["relevance_score"]] for each in results]


@pytest.mark.parametrize("name", ["langchain chat", "langchain stream", "litellm chat", "litellm stream"])
def test_answers_are_ours(told: dict[str, tuple[bool, Any]], name: str) -> None:
    assert told[name] == (True, SAID)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cohere refused", "Model 'nope' not found"),
        ("voyage refused", "Model 'nope' not found"),
        ("litellm refused", "temperature"),
        ("hugging face refused", "maximum of 512 tokens"),
    ],
)
def test_refusals_are_shown(told: dict[str, tuple[bool, Any]], name: str, words: str) -> None:
    answered, value = told[name]
    assert not answered
    assert words in value

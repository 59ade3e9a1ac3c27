"""The gateway that the clients call, and what their calls came to."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clip_checkpoints import V1, write_model
from tests.docs.examples import ROOT, Example, examples
from tests.e2e.conftest import Api
from tests.media.pictures import noise, saved
from tests.stack import MODEL, Stack
from tests.vlm_served import CACHE_BYTES, PARROT, write_answering

FOLDER = Path(__file__).parent
BUILT = ROOT / ".venv-clients"
TEXTS = ["a cat purrs", "rain"]
QUERY = "feline"
PICTURE = saved(noise(40, 30))

Told = dict[str, tuple[bool, Any]]
"""For each call whether there was an answer, and that or what the client showed."""


@pytest.fixture(scope="module")
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A gateway before all that the clients call; its parameter, if any, is settings of a module's own."""
    folder = write_answering(tmp_path_factory.mktemp("weights"))
    write_model(folder, V1)
    settings = {
        "SF_MODEL_DIR": str(folder),
        "SF_CATALOG_FILE": str(folder / "catalog.yaml"),
        "SF_CHAT_CACHE_BYTES": str(CACHE_BYTES),
        **getattr(request, "param", {}),
    }
    with Stack(tmp_path_factory.mktemp("clients"), settings) as stack:
        stack.serve("embed", "rerank", "chat", models=(MODEL, V1, PARROT))
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    path.write_bytes(PICTURE)
    return path


def installed(target: str, inside: str) -> Path:
    """A program of the environment of ``make TARGET``; without it tests skip, which CI must not do."""
    path = BUILT / target / inside
    if not (BUILT / target / "built").exists() or not path.exists():
        reason = f"needs the clients that `scripts/install-clients {target}` brings"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return path


def snippets(language: str, *, soak: bool = False) -> list[Example]:
    """The runnable blocks of the page on clients; those about vector stores are run by ``make soak``."""
    page = ROOT / "docs/use-from.md"
    first = page.read_text("utf-8").partition("\n## Vector stores\n")[0].count("\n")
    found = [each for each in examples("docs/use-from.md") if each.language == language]
    return [each for each in found if (each.line > first) == soak]


def here(api: Api, snippet: Example) -> str:
    """The code of a block that calls the gateway of the tests."""
    return snippet.replacing({"127.0.0.1:8080": f"127.0.0.1:{api.stack.http_port}"})


def check(told: Told, snippet: Example) -> None:
    """Hold what a block printed to what the page shows."""
    answered, value = told[str(snippet)]
    assert answered, value
    assert snippet.shown == "text"
    snippet.check(value)


def run(api: Api, picture: Path, command: Sequence[str | Path], blocks: Sequence[Example] = ()) -> Told:
    """Run a file of calls, and snippets after them; see ``told.py``."""
    environment = {
        **os.environ,
        # Written at the first run, so that later ones need not compile a hundred packages.
        "PYTHONDONTWRITEBYTECODE": "",
        "BASE": api.stack.url,
        "API_KEY": api.key,
        "MODEL": MODEL,
        "CLIP": V1,
        "CHAT_MODEL": PARROT,
        "PICTURE": str(picture),
    }
    done = subprocess.run(
        command,
        env=environment,
        input=json.dumps([(str(block), here(api, block)) for block in blocks]),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (answered, value) for name, answered, value in lines}


def vectors(api: Api, told: Told, name: str, **fields: Any) -> None:
    """Hold a call's vectors of ``TEXTS``, or of its first ones, to our own answer."""
    answered, value = told[name]
    assert answered, value
    expected = [item["embedding"] for item in api.embed(TEXTS, **fields).json["data"]]
    np.testing.assert_allclose(np.asarray(value), expected[: len(value)], rtol=1e-5, atol=1e-7)


def pictures(api: Api, told: Told, name: str) -> None:
    """Hold a call's one vector of ``PICTURE`` to our own answer."""
    answered, value = told[name]
    assert answered, value
    item = {"image": base64.b64encode(PICTURE).decode()}
    (expected,) = api.embed([item], model=V1).json["data"]
    np.testing.assert_allclose(np.asarray(value), [expected["embedding"]], rtol=1e-4, atol=1e-6)


def ranking(api: Api, told: Told, name: str) -> None:
    """Hold a call's pairs of index and score to our own answer."""
    answered, value = told[name]
    assert answered, value
    results = api.rerank(QUERY, TEXTS).json["results"]
    assert [index for index, _ in value] == [each["index"] for each in results]
    scores = [each["relevance_score"] for each in results]
    np.testing.assert_allclose([score for _, score in value], scores, rtol=1e-6)


def refused(told: Told, name: str, words: str) -> None:
    """Hold what a client shows of a refusal to the reason in it."""
    answered, value = told[name]
    assert not answered, value
    assert words in value

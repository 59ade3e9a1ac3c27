"""What the documentation prints is what happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clip_checkpoints import V1, write_model
from tests.docs.examples import ROOT, Example, examples
from tests.omni_checkpoints import NANO, write_served
from tests.stack import Stack
from tests.vlm_checkpoints import write_parrot
from tests.vlm_served import CACHE_BYTES

PAGES = (
    "README.md",
    "docs/embeddings.md",
    "docs/rerank.md",
    "docs/classify.md",
    "docs/media.md",
    "docs/batch.md",
    "docs/chat.md",
)


VLM = "jina-vlm"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("docs")
    write_model(folder / "models", V1)
    write_served(folder / "models", NANO)
    write_parrot(folder / "models" / VLM, "Two cats.", positions=40960)
    # The pages show the numbers of fp32.
    settings = {
        "SF_MODEL_DIR": str(folder / "models"),
        "SF_CHAT_CACHE_BYTES": str(CACHE_BYTES),
        "SF_DTYPE": "float32",
    }
    with Stack(folder, settings) as running:
        models = ("all-MiniLM-L6-v2", V1, NANO, VLM)
        running.serve("embed", "rerank", "classify", "batch", "chat", models=models)
        running.gateway()
        yield running


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return stack.create_key()


ALL = [
    each
    for page in (*PAGES, "docs/python.md", "docs/openai.md", "docs/vendors.md")
    for each in examples(page)
]


@pytest.mark.parametrize("example", ALL, ids=str)
def test_examples_run(example: Example, stack: Stack, key: str) -> None:
    replaced = {
        "127.0.0.1:8080": f"127.0.0.1:{stack.http_port}",
        "127.0.0.1:50051": stack.services[0].address,
        "jina_...": key,
    }
    example.check(example.run(replaced, API_KEY=key))


def test_pages_have_examples_of_each_kind() -> None:
    found = [(each.page, each.language) for page in PAGES for each in examples(page)]
    for page in PAGES:
        assert found.count((page, "sh")) >= 1
        assert found.count((page, "python")) >= 2
        assert Path(ROOT / page).is_file()

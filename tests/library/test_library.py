"""The models from Python: by id and by directory, every kind of result, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from search_foundation import Model, ModelError, load
from services.core.catalog import Catalog
from services.core.modeling.registry import load_cross_encoder, load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.decoder_checkpoints import write_code
from tests.text_checkpoints import write_model

MINILM = "all-MiniLM-L6-v2"
HELLO_WORLD = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
V3, COLBERT, ELSER = "jina-embeddings-v3", "jina-colbert-v2", "elser-v2"
V1, V2 = "jina-reranker-v1-tiny-en", "jina-reranker-v2-base-multilingual"
BARE = """
models:
  - id: bare
    name: Bare
    owner: acme
    family: jina_code
    licence: MIT
    released: 2026-01-02
    description: Adds nothing to a text.
    capabilities: [embed]
    modalities: [text]
    outputs: [dense]
    context_length: 128
    parameters: 1000
    dimensions: 32
"""
TEXTS = ["the quick brown fox", "hello world", "a dog, a fox."]


def tiny(folder: Path, model: str) -> Model:
    write_model(folder, model)
    return load(model, model_dir=folder, device="cpu", dtype="float32")


def test_the_published_vector() -> None:
    with load(MINILM, dtype="float32") as model:
        one = model.encode("hello world")
        both = model.encode(["hello world", "good morning"])
        assert model.spec.dimensions == 384
        assert repr(model) == "Model('all-MiniLM-L6-v2')"
        assert model.encode("hello " * 600, truncate=True, dimensions=8).shape == (8,)
    np.testing.assert_allclose(one[:5], HELLO_WORLD, atol=1e-4)
    assert both.shape == (2, 384)
    assert both.dtype == np.float32
    np.testing.assert_allclose(both[0], one, atol=1e-6)


def test_what_is_no_model() -> None:
    with pytest.raises(
        ModelError, match="'/tmp/nothing' is neither a directory nor a model of the catalogue"
    ):
        load("/tmp/nothing")
    with pytest.raises(ModelError, match="Unknown model 'jina-embeddings-v9'"):
        load("jina-embeddings-v9")


def test_options_are_those_of_a_request(tmp_path: Path) -> None:
    with tiny(tmp_path, V3) as model:
        plain = model.encode(TEXTS)
        query = model.encode(TEXTS, task="retrieval.query")
        short = model.encode(TEXTS, dimensions=32)
        raw = model.encode(TEXTS, normalized=False)
        late = model.encode(TEXTS, late_chunking=True)
        assert model.encode([]).shape == (0, 1024)
        with pytest.raises(ModelError, match=r"'task' Input should be 'retrieval\.query'"):
            model.encode(TEXTS, task="clustering")
        with pytest.raises(ModelError, match="'dimensions'"):
            model.encode(TEXTS, dimensions=2000)
        with pytest.raises(ModelError, match="no option 'role'"):
            model.encode(TEXTS, role="query")
        with pytest.raises(ModelError, match="8194 tokens"):
            model.encode("hello " * 9000)
        with pytest.raises(ModelError, match="does not score"):
            model.score("hello", TEXTS)
    assert np.abs(plain - query).max() > 0.01
    assert np.abs(plain - late).max() > 0.01
    assert short.shape == (3, 32)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, plain, atol=1e-6)


def test_token_vectors_and_late_interaction(tmp_path: Path) -> None:
    with tiny(tmp_path, COLBERT) as model:
        queries = model.encode(TEXTS, role="query")
        documents = model.encode(TEXTS)
        alone = model.encode(TEXTS[0])
        scores = model.score("hello fox", TEXTS)
        asked = model.encode("hello fox", role="query")
    assert [each.shape for each in queries] == [(32, 128)] * 3
    np.testing.assert_allclose(alone, documents[0], atol=1e-6)
    wanted = [(asked @ document.T).max(1).sum() for document in documents]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_sparse_vectors(tmp_path: Path) -> None:
    with tiny(tmp_path, ELSER) as model:
        (weights, other) = model.encode(["hello world", "the lazy dog"])
    encoder = load_text_encoder(
        Catalog.load().require(ELSER), tmp_path / ELSER, device=torch.device("cpu"), dtype=torch.float32
    )
    (tokens,) = encoder.tokenizer.encode_batch(["hello world"])
    (vector,) = encoder.forward([EncodeItem(tokens.ids)])
    names = encoder.tokenizer.names(vector.indices.tolist())  # type: ignore[union-attr]
    assert weights == pytest.approx(dict(zip(names, vector.values.tolist(), strict=True)), abs=1e-5)  # type: ignore[union-attr]
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert weights != other


@pytest.mark.parametrize("name", [V1, V2])
def test_scores_of_a_cross_encoder(tmp_path: Path, name: str) -> None:
    with tiny(tmp_path, name) as model:
        scores = model.score("hello world", TEXTS)
        assert model.score("hello", []).shape == (0,)
        with pytest.raises(ModelError, match="does not embed"):
            model.encode("hello")
    spec = Catalog.load().require(name)
    alone = load_cross_encoder(spec, tmp_path / name, device=torch.device("cpu"), dtype=torch.float32)
    pairs = alone.tokenizer.pairs(alone.tokenizer.query("hello world"), TEXTS)
    wanted = [alone.forward([EncodeItem(pair.windows[0])])[0] for pair in pairs]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)


def test_a_directory_is_known_by_its_name_or_by_the_entry(tmp_path: Path) -> None:
    folder = write_model(tmp_path, V3)
    with load(folder, dtype="float32") as model:
        wanted = model.encode("hello world")
    moved = folder.rename(tmp_path / "download")
    with pytest.raises(ModelError, match="name it with 'entry'"):
        load(moved)
    with load(str(moved), entry=V3, dtype="float32") as model:
        np.testing.assert_array_equal(model.encode("hello world"), wanted)
    with pytest.raises(ModelError, match="looks like 'jina_v3'"):
        load(moved, entry=COLBERT)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Unknown model 'no-such-model'"):
        load("no-such-model")
    with pytest.raises(ModelError, match="There are no weights of jina-embeddings-v3 here"):
        load(V3, model_dir=tmp_path)
    with pytest.raises(ModelError, match="is no directory"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="'tpu'"):
        load(MINILM, device="tpu")


def test_threads_may_share_a_model_until_it_is_closed() -> None:
    model = load(MINILM, dtype="float32")
    texts = [f"text number {i}" for i in range(40)]
    together = model.encode(texts)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(model.encode, texts))
    np.testing.assert_allclose(np.stack(alone), together, atol=1e-5)
    model.close()
    model.close()
    with pytest.raises(ModelError, match="closed"):
        model.encode("hello")


@pytest.mark.parametrize("instructions", ["auto", "torch"])
def test_forked_processes_compute_as_their_parent(instructions: str) -> None:
    """As a prefork server does: loaded once, used before the fork, in the children, and behind it."""
    script = """
import os, sys
import numpy as np
from search_foundation import load

model = load("all-MiniLM-L6-v2", dtype="float32")
texts = ["hello world " * n for n in (1, 40, 100)]
wanted = model.encode(texts)
children = []
for _ in range(2):
    child = os.fork()
    children = [*children, child] if child else []  # the first child forks another
assert np.array_equal(model.encode(texts), wanted)
assert model.encode("hello").shape == (384,)
model.close()
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
os.write(1, b"well")
"""
    environment = {**os.environ, "SF_CPU_INSTRUCTIONS": instructions}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "well" * 4), done.stderr


def test_a_forked_process_may_leave_the_model_alone() -> None:
    with load(MINILM, dtype="float32") as model:
        vector = model.encode("hello")
        child = os.fork()
        if child == 0:
            model.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(model.encode("hello"), vector)


def test_a_script_that_forgets_to_close_ends() -> None:
    script = (
        "from search_foundation import load\n"
        "print(load('all-MiniLM-L6-v2', dtype='float32').encode('hello world').shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stdout) == (0, "(384,)\n"), done.stderr


@pytest.mark.parametrize("closing", ["atexit.register(model.close)", "keep = Keeper()"])
def test_closing_at_the_end_of_the_interpreter_is_silent(closing: str) -> None:
    script = f"""
import atexit
from search_foundation import load

class Keeper:
    def __del__(self):
        model.close()

model = load("all-MiniLM-L6-v2", dtype="float32")
{closing}
print(model.encode("hello world").shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(384,)\n", "")


def test_a_text_of_no_tokens_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that adds nothing to a text, neither specials nor a prompt."""
    (tmp_path / "catalog.yaml").write_text(BARE)
    monkeypatch.setenv("SF_CATALOG_FILE", str(tmp_path / "catalog.yaml"))
    write_code(tmp_path / "bare")
    with load("bare", model_dir=tmp_path, device="cpu", dtype="float32") as model:
        assert model.encode("a").shape == (32,)
        with pytest.raises(ModelError, match=r"^Model 'bare' finds no tokens in the text ''\.$"):
            model.encode(["a", ""])


def test_the_package_does_not_import_torch_by_itself() -> None:
    script = "import sys, search_foundation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import search_foundation

        search_foundation.nothing  # noqa: B018

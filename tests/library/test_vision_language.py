"""Models that see and hear, from Python: pictures under a query, vectors of tokens, sounds, films, groups."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from tokenizers import Tokenizer

from search_foundation import ModelError, load
from tests import omni_checkpoints, vision_checkpoints
from tests import vision_references as reference
from tests.media.films import film, sound
from tests.media.pictures import A4, noise, pdf, photograph, saved
from tests.omni_checkpoints import NANO
from tests.omni_references import FILM, TONE, filmed, heard, omni
from tests.vision_checkpoints import M0, MAX_PIXELS, V4

TEXT = "the quick brown fox"
SMALL = saved(noise(90, 60))
FLOWER = photograph("flower.jpg")


def opened(data: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(data)).convert("RGB")


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_scores_of_pictures(tmp_path: Path) -> None:
    folder = vision_checkpoints.write_served(tmp_path, M0)
    path = tmp_path / "flower.jpg"
    path.write_bytes(FLOWER)
    with load(M0, model_dir=tmp_path, device="cpu", dtype="float32") as model:
        by_text = model.score(TEXT, ["a dog", SMALL, path, {"text": "hello world"}, {"image": SMALL}])
        by_picture = model.score(SMALL, ["a dog", path])
        with pytest.raises(
            ModelError, match="The image of document 1 cannot be used: its PNG data is truncated"
        ):
            model.score(TEXT, ["a dog", saved(noise(300, 300))[:-5000]])
        with pytest.raises(ModelError, match="video"):
            model.score(TEXT, ["a dog", FILM])
        assert model.score(TEXT, ["a dog"]) == pytest.approx(by_text[:1], abs=1e-6)

    def wanted(query: str | Pillow.Image, documents: list[str | Pillow.Image]) -> list[float]:
        return [reference.score(folder, query, each, limits=(3136, 602_112)) for each in documents]

    documents = ["a dog", opened(SMALL), opened(FLOWER), "hello world", opened(SMALL)]
    np.testing.assert_allclose(by_text, wanted(TEXT, documents), atol=2e-5)
    np.testing.assert_allclose(by_picture, wanted(opened(SMALL), ["a dog", opened(FLOWER)]), atol=2e-5)


def test_one_vector_or_one_of_each_token(tmp_path: Path) -> None:
    folder = vision_checkpoints.write_served(tmp_path, V4)
    with load(V4, model_dir=tmp_path, device="cpu", dtype="float32") as model:
        dense = model.encode([TEXT, SMALL], task="code.query", dimensions=64)
        several = model.encode([TEXT, SMALL], multivector=True)
        alone = model.encode(SMALL, multivector=True)
        pages = model.encode(pdf(A4, A4))
        with pytest.raises(ModelError, match="'dimensions' cannot be set when"):
            model.encode(SMALL, multivector=True, dimensions=8)
        with pytest.raises(ModelError, match="The image of input 1 cannot be used: it is MP4"):
            model.encode([TEXT, {"image": film()}])

    def wanted(what: str | Pillow.Image, task: str, *, multivector: bool = False) -> np.ndarray:
        return reference.embedding(
            folder, what, task=task, limits=(3136, MAX_PIXELS), multivector=multivector
        )

    for found, what in zip(dense, (TEXT, opened(SMALL)), strict=True):
        np.testing.assert_allclose(found, unit(wanted(what, "code")[:64]), atol=1e-5)
    for vectors, what in zip(several, (TEXT, opened(SMALL)), strict=True):
        np.testing.assert_allclose(vectors, wanted(what, "text-matching", multivector=True), atol=1e-5)
    assert len(several[0]) == len(
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Query: " + TEXT)
    )
    np.testing.assert_allclose(alone, several[1], atol=1e-6)
    assert pages.shape == (2, 2048)


def test_sounds_films_and_groups(tmp_path: Path) -> None:
    folder = omni_checkpoints.write_served(tmp_path, NANO)
    path = tmp_path / "film.mkv"
    path.write_bytes(FILM)
    with load(NANO, model_dir=tmp_path, device="cpu", dtype="float32") as model:
        found = model.encode([TONE, path, "hello world", {"content": ["see ", path, TONE]}])
        alone = model.encode(path, task="clustering")
        pages = model.encode(pdf(A4, A4))
        with pytest.raises(ModelError, match="A sound of 20 ms"):
            model.encode([sound(0.02)])
        with pytest.raises(ModelError, match="The video of part 1 of input 0 cannot be used"):
            model.encode({"content": ["see ", {"video": film()[:-3000]}]})
    network = omni(folder, "text-matching")
    wanted = [
        network.vector([heard()]),
        network.vector([filmed()]),
        network.vector(["hello world"], "Document: "),
        network.vector(["see ", filmed(), heard()]),
    ]
    np.testing.assert_allclose(found, [unit(each) for each in wanted], atol=1e-5)
    np.testing.assert_allclose(alone, unit(omni(folder, "clustering").vector([filmed()])), atol=1e-5)
    assert pages.shape == (2, 768)

"""Pictures and PDFs from Python: bytes, paths, objects as in a request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search_foundation import ModelError, load
from tests import clip_references as reference
from tests.clip_checkpoints import V1, write_model
from tests.media.pictures import A4, pdf, photograph


def test_pictures_beside_texts(tmp_path: Path) -> None:
    write_model(tmp_path, V1)
    path = tmp_path / "flower.jpg"
    path.write_bytes(photograph("flower.jpg"))
    with load(V1, model_dir=tmp_path, device="cpu", dtype="float32") as model:
        china, dog, flower = model.encode([photograph(), "a dog", path], normalized=False)
        alone = model.encode(path, normalized=False)
        pages = model.encode(pdf(A4, A4))
        with pytest.raises(ModelError, match="The image of input 0 cannot be used"):
            model.encode([b"no picture"])
        with pytest.raises(ModelError, match="cannot be read"):
            model.encode(tmp_path / "nothing.png")
        with pytest.raises(ModelError, match="must be the only input"):
            model.encode(["a dog", pdf(A4)])
    folder = tmp_path / V1
    np.testing.assert_allclose(china, reference.image_vector(folder, photograph()), atol=1e-5)
    np.testing.assert_allclose(dog, reference.text_vector(folder, "a dog"), atol=1e-5)
    np.testing.assert_allclose(flower, reference.image_vector(folder, path.read_bytes()), atol=1e-5)
    np.testing.assert_allclose(alone, flower, atol=1e-6)
    assert pages.shape == (2, 768)

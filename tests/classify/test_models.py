"""Every text-only model that the contract lists for ``/v1/classify``, ``/v1/train`` and ``/v1/batch``.

Each is loaded at its first call here, so that the tiny files of all of them need the memory of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from searchfoundation.v1 import classify_pb2, common_pb2

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, Modality
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from services.core.settings import Settings
from tests.classify.conftest import Rig, refused
from tests.decoder_checkpoints import write_served
from tests.rig import settings
from tests.text_checkpoints import write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

V2 = tuple(f"jina-embeddings-v2-base-{name}" for name in ("en", "zh", "de", "es", "code"))
V3 = "jina-embeddings-v3"
V5 = ("jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small")
CODE = ("jina-code-embeddings-0.5b", "jina-code-embeddings-1.5b")
CLASSIFY = {*V2, V3, *V5, *CODE}
TRAIN = {*V2, V3, *V5}

TEXTS = ["hello world", "the quick brown fox"]
LABELS = ["a greeting", "an animal", "x"]

# How a text is read to be classified: what stands before it, and the adapter.
READING: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(V2, ("", None)),
    V3: ("", "classification"),
    **dict.fromkeys(V5, ("Document: ", "classification")),
    **dict.fromkeys(CODE, ("Find the most relevant code snippet given the following query:\n", None)),
}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("models")
    for model in READING:
        (write_served if model in (*V5, *CODE) else write_model)(folder, model)
    return settings(
        models=tuple(READING),
        model_dir=folder,
        data_dir=folder / "data",
        model_residency="lazy",
        device_memory_bytes=32 << 20,
    )


def unit_vectors(folder: Path, model: str, texts: list[str]) -> np.ndarray:
    """Vectors (texts, width) of the network alone."""
    spec = Catalog.load().require(model)
    network = load_text_encoder(spec, folder / model, device=torch.device("cpu"), dtype=torch.float32)
    prompt, adapter = READING[model]
    tokens = network.tokenizer.encode_batch([prompt + text for text in texts])
    vectors = np.stack([network.forward([EncodeItem(each.ids, adapter)])[0] for each in tokens])  # type: ignore[arg-type]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


async def test_the_catalogue_lists_what_the_contract_lists() -> None:
    texts_only = [s for s in Catalog.load().models.values() if s.modalities == (Modality.TEXT,)]
    jina = [spec for spec in texts_only if spec.owner == "jina-ai"]
    assert {spec.id for spec in jina if spec.classify_inputs} == CLASSIFY
    assert {spec.id for spec in jina if spec.supports(Capability.CLASSIFY)} == CLASSIFY
    assert {spec.id for spec in jina if spec.train_inputs} == TRAIN
    assert {spec.id for spec in jina if spec.supports(Capability.BATCH)} == set(V5)


@pytest.mark.parametrize("model", READING)
async def test_zero_shot_and_few_shot(rig: Rig, chosen: Settings, clean: None, model: str) -> None:
    assert chosen.model_dir is not None
    vectors = unit_vectors(chosen.model_dir, model, TEXTS + LABELS)
    cosines = vectors[: len(TEXTS)] @ vectors[len(TEXTS) :].T
    scores = np.exp(cosines) / np.exp(cosines).sum(axis=1, keepdims=True)
    answer = await rig.classify(model=model, input=TEXTS, labels=LABELS)
    found = [[each["score"] for each in item["predictions"]] for item in answer["data"]]
    np.testing.assert_allclose(found, scores, atol=1e-5)
    contents = [common_pb2.Content(text=text) for text in TEXTS]
    request = classify_pb2.ClassifyRequest(model=model, inputs=contents, labels=LABELS)
    typed = await rig.typed.Classify(request)
    found = [[each.score for each in item.predictions[0].labels] for item in typed.classifications]
    np.testing.assert_allclose(found, scores, atol=1e-5)

    examples = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=False)]
    if model not in TRAIN:
        status, body = await refused(rig.train(model=model, input=examples))
        assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
        return
    classifier = (await rig.train(model=model, input=examples, num_iters=30))["classifier_id"]
    learned = await rig.classify(classifier_id=classifier, input=TEXTS)
    assert [item["prediction"] for item in learned["data"]] == LABELS[:2]

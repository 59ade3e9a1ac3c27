"""Pictures in classification: zero-shot, few-shot, training; by jina-clip, beside references in float64."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from searchfoundation.v1 import classify_pb2, common_pb2

from services.core.settings import Settings
from tests import clip_references as reference
from tests.classify.conftest import Rig, refused
from tests.clip_checkpoints import V1, write_model
from tests.media.pictures import A4, noise, pdf, photograph, saved
from tests.rig import MINILM, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

LABELS = ["hello world", "a dog", "the quick fox"]
CHINA, FLOWER = photograph(), photograph("flower.jpg")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, V1)
    return settings(models=(V1, MINILM), model_dir=folder, data_dir=folder / "data", media_decoders=1)


def picture(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def expected(folder: Path, *inputs: str | bytes) -> np.ndarray:
    """The scores: a softmax over the plain cosines."""
    of = [
        unit(
            reference.text_vector(folder, each)
            if isinstance(each, str)
            else reference.image_vector(folder, each)
        )
        for each in inputs
    ]
    cosines = np.array(of) @ np.array([unit(reference.text_vector(folder, label)) for label in LABELS]).T
    odds = np.exp(cosines)
    return odds / odds.sum(1, keepdims=True)


async def test_pictures_and_texts_are_sorted_under_labels(rig: Rig, chosen: Settings) -> None:
    assert chosen.model_dir is not None
    answered = await rig.classify(model=V1, input=[picture(CHINA), "a dog", picture(FLOWER)], labels=LABELS)
    scores = [[each["score"] for each in item["predictions"]] for item in answered["data"]]
    np.testing.assert_allclose(scores, expected(chosen.model_dir / V1, CHINA, "a dog", FLOWER), atol=1e-5)
    tokens = sum(len(reference.token_ids(chosen.model_dir / V1, text)) for text in ("a dog", *LABELS))
    assert answered["usage"] == {"total_tokens": tokens + 2 * 6000, "image_tokens": 2 * 6000}


async def test_labels_may_come_in_groups(rig: Rig) -> None:
    groups = {"place": LABELS, "thing": ["a fox", "a world"]}
    answered = await rig.classify(model=V1, input=picture(CHINA), labels=groups)
    (item,) = answered["data"]
    assert {name: len(each) for name, each in item["predictions"].items()} == {"place": 3, "thing": 2}


async def test_a_classifier_learns_from_pictures(rig: Rig, clean: None) -> None:
    examples = [
        {**picture(CHINA), "label": "china"},
        {**picture(FLOWER), "label": "flower"},
        {"text": "a dog", "label": "dog"},
    ]
    made = await rig.train(model=V1, input=examples, access="private", num_iters=10)
    assert made["num_samples"] == 3
    assert made["usage"] == {"total_tokens": 10 * (2 * 6000 + 4), "image_tokens": 10 * 2 * 6000}
    named = {"classifier_id": made["classifier_id"]}
    answered = await rig.classify(**named, input=[picture(FLOWER), picture(CHINA), "a dog"])
    assert [item["prediction"] for item in answered["data"]] == ["flower", "china", "dog"]
    await rig.train(**named, input={**picture(saved(noise(50, 50))), "label": "noise"})
    status, body = await refused(rig.train(**named, input=[{**picture(b"broken"), "label": "noise"}]))
    assert (status, body["code"]) == (400, "INPUT_INVALID")
    assert "The image of input 0 cannot be used" in body["detail"]


async def test_what_is_not_taken_is_refused(rig: Rig, clean: None) -> None:
    status, body = await refused(rig.classify(model=MINILM, input=[picture(CHINA)], labels=LABELS))
    assert status == 422
    assert "takes text only" in body["detail"]
    document = {"pdf": base64.b64encode(pdf(A4)).decode()}
    status, body = await refused(rig.classify(model=V1, input=document, labels=LABELS))
    assert status == 422
    assert "does not take 'pdf'" in body["detail"]
    # Which model a classifier has is known only when it has been looked up.
    classifier = await rig.new()
    status, body = await refused(rig.classify(classifier_id=classifier, input=[picture(CHINA)]))
    assert status == 400
    assert body["detail"] == f"Model '{MINILM}' takes text only, not 'image'."


async def test_typed_calls_take_bytes(rig: Rig, clean: None) -> None:
    image = common_pb2.Content(image=common_pb2.Media(data=CHINA))
    answered = await rig.typed.Classify(classify_pb2.ClassifyRequest(model=V1, inputs=[image], labels=LABELS))
    by_rest = await rig.classify(model=V1, input=[picture(CHINA)], labels=LABELS)
    scores = [each["score"] for each in by_rest["data"][0]["predictions"]]
    typed = [each.score for each in answered.classifications[0].predictions[0].labels]
    np.testing.assert_allclose(typed, scores, atol=1e-6)
    example = classify_pb2.TrainingExample(content=image, label="china")
    other = classify_pb2.TrainingExample(content=common_pb2.Content(text="a dog"), label="dog")
    made = await rig.typed.Train(classify_pb2.TrainRequest(model=V1, examples=[example, other]))
    assert made.samples == 2
    await rig.delete(made.classifier_id)

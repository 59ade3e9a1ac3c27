"""Models that read pictures, sounds and films, through the real Envoy: vectors, scores, usage, refusals."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests import omni_checkpoints, vision_checkpoints
from tests import vision_references as reference
from tests.e2e.conftest import Api
from tests.gateway.client import Answer, call
from tests.media.films import film
from tests.media.pictures import A4, BAD, noise, pdf, photograph, saved
from tests.omni_checkpoints import NANO
from tests.omni_references import FILM, FIT, TONE, filmed, heard, omni, photo
from tests.stack import START_SECONDS, Stack
from tests.vision_checkpoints import M0, MAX_PIXELS, V4

TEXT = "the quick brown fox"
SMALL, LARGE = saved(noise(90, 60)), saved(noise(300, 220, 1))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("seeing")
    for model in (V4, M0):
        vision_checkpoints.write_served(folder / "models", model)
    omni_checkpoints.write_served(folder / "models", NANO)
    settings = {
        "SF_MODEL_DIR": str(folder / "models"),
        "SF_DTYPE": "float32",
        "SF_MEDIA_DECODERS": "1",
    }
    with Stack(folder, settings) as stack:
        stack.serve("embed", "rerank", "batch", models=(V4, M0, NANO))
        stack.gateway()
        yield Api(stack, stack.create_key())


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(data: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(data)).convert("RGB")


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def weights(api: Api, model: str) -> Path:
    return Path(api.stack.settings["SF_MODEL_DIR"]) / model


def vectors(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    assert [item["index"] for item in answer.json["data"]] == list(range(len(answer.json["data"])))
    return np.array([item["embedding"] for item in answer.json["data"]])


def by_v4(api: Api, what: Any, **options: Any) -> np.ndarray:
    return reference.embedding(
        weights(api, V4), what, task="text-matching", limits=(3136, MAX_PIXELS), **options
    )


def test_v4_embeds_texts_and_pictures_in_their_order(api: Api) -> None:
    answer = api.embed([TEXT, {"image": text(SMALL)}, {"image": text(LARGE)}, "a dog"], model=V4)
    wanted = [by_v4(api, each) for each in (TEXT, opened(SMALL), opened(LARGE), "a dog")]
    np.testing.assert_allclose(vectors(answer), wanted, atol=1e-5)
    usage = answer.json["usage"]
    # 84 x 56 pixels are three by two states, 252 x 168 are nine by six.
    assert usage["image_tokens"] == 6 + 54
    assert usage["total_tokens"] == usage["prompt_tokens"] > 60


def test_v4_gives_a_vector_for_each_token_in_base64(api: Api) -> None:
    options = {"return_multivector": True, "return_tokenized_input": True, "embedding_type": "base64"}
    answer = api.embed([TEXT, {"image": text(SMALL)}], model=V4, **options)
    assert answer.status == 200
    for item, given in zip(answer.json["data"], (TEXT, opened(SMALL)), strict=True):
        found = [np.frombuffer(base64.b64decode(row), "<f4") for row in item["embeddings"]]
        np.testing.assert_allclose(found, by_v4(api, given, multivector=True), atol=1e-5)
        assert len(item["tokenized_input"]) == len(found)


@pytest.mark.parametrize(
    ("value", "options", "says"),
    [
        (
            TEXT,
            {"return_multivector": True, "dimensions": 128},
            "'dimensions' cannot be set when 'return_multivector' is True",
        ),
        (
            TEXT,
            {"return_tokenized_input": True},
            "'return_tokenized_input' requires 'return_multivector' to be True",
        ),
        (
            TEXT,
            {"return_multivector": True, "late_chunking": True},
            "'late_chunking' cannot be set when 'return_multivector' is True",
        ),
        ([TEXT, {"image": text(SMALL)}], {"late_chunking": True}, "'late_chunking' reads texts only"),
    ],
)
def test_v4_says_what_does_not_go_together(api: Api, value: Any, options: dict[str, Any], says: str) -> None:
    answer = api.embed(value, model=V4, **options)
    assert answer.error() == (422, "VALIDATION_ERROR")
    assert says in answer.body.decode()


def test_v4_embeds_a_picture_of_a_batch_line(api: Api) -> None:
    lines = [
        {"custom_id": "seen", "body": {"input": ["a dog", {"image": text(SMALL)}]}},
        {"custom_id": "bad", "body": {"input": [{"image": text(FILM)}]}},
    ]
    job = api.post({"model": V4, "input": lines}, "/v1/batch/embeddings")
    assert job.status == 200, job.body
    path = f"/v1/batch/{job.json['batch_id']}"
    deadline = time.monotonic() + START_SECONDS
    while (status := fetched(api, path).json)["status"] != "completed":
        assert status["status"] in ("pending", "processing")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (status["stats"]["completed"], status["stats"]["failed"]) == (1, 1)
    (line,) = fetched(api, f"{path}/output").body.splitlines()
    body = json.loads(line)["response"]["body"]
    wanted = [by_v4(api, each) for each in ("a dog", opened(SMALL))]
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], wanted, atol=1e-5)
    assert "The image of input 0 cannot be used" in fetched(api, f"{path}/errors").body.decode()


def fetched(api: Api, path: str) -> Answer:
    return call(api.stack.http_port, "GET", path, headers=api.authorization)


def score(api: Api, query: Any, document: Any) -> float:
    return reference.score(weights(api, M0), query, document, limits=(3136, 602_112))


def test_m0_ranks_texts_and_pictures_together(api: Api) -> None:
    flower = photograph("flower.jpg")
    sent: list[Any] = [
        "a dog",
        {"image": text(SMALL), "id": 7},
        {"text": "hello world", "page": 3},
        {"image": f"data:image/jpeg;base64,{text(flower)}"},
    ]
    answer = api.rerank(TEXT, sent, model=M0)
    assert answer.status == 200, answer.body
    expected = np.array(
        [score(api, TEXT, d) for d in ("a dog", opened(SMALL), "hello world", opened(flower))]
    )
    results = answer.json["results"]
    assert [each["index"] for each in results] == np.argsort(-expected, kind="stable").tolist()
    for each in results:
        assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=2e-5)
        assert each["document"] == sent[each["index"]]
    # The flower's 345 states and the six of the small picture, and what stands around each.
    plain = api.rerank(TEXT, ["a dog", "hello world"], model=M0).json["usage"]["total_tokens"]
    assert answer.json["usage"]["total_tokens"] == plain + 345 + 2 + 6 + 2


def test_m0_answers_a_picture_with_the_best(api: Api) -> None:
    documents = ["a dog", {"image": text(LARGE)}, "hello world"]
    answer = api.rerank({"image": text(SMALL)}, documents, model=M0, top_n=1, return_documents=False)
    assert answer.status == 200, answer.body
    expected = [score(api, opened(SMALL), each) for each in ("a dog", opened(LARGE), "hello world")]
    (best,) = answer.json["results"]
    assert set(best) == {"index", "relevance_score"}
    assert best["index"] == int(np.argmax(expected))
    assert best["relevance_score"] == pytest.approx(max(expected), abs=2e-5)


def test_omni_embeds_every_kind_and_groups(api: Api) -> None:
    group = [{"text": "see "}, {"video": text(FILM)}, {"audio": text(TONE)}, {"text": "a dog"}]
    kinds = [{"image": text(photograph())}, {"audio": text(TONE)}, {"video": text(FILM)}]
    answer = api.embed(["hello world", *kinds, {"content": group}], model=NANO, task="retrieval.query")
    network = omni(weights(api, NANO), "retrieval")
    wanted = [
        network.vector(["hello world"], "Query: "),
        *(network.vector([each]) for each in (photo(), heard(), filmed())),
        network.vector(["see ", filmed(), heard(), "a dog"]),
    ]
    np.testing.assert_allclose(vectors(answer), [unit(each) for each in wanted], atol=1e-5)
    usage = answer.json["usage"]
    # 640 x 416 pixels; 40 spectra, twice; two pairs of frames of 320 x 320, twice.
    assert (usage["image_tokens"], usage["audio_tokens"], usage["video_tokens"]) == (260, 20, 400)
    assert usage["total_tokens"] == usage["prompt_tokens"] > 680


def test_omni_embeds_each_page_of_a_pdf(api: Api) -> None:
    both = api.embed({"pdf": text(pdf(A4, (300.0, 200.0)))}, model=NANO)
    second = api.embed({"pdf": text(pdf((300.0, 200.0)))}, model=NANO)
    assert vectors(both).shape == (2, 768)
    size = FIT.size(625, 417)
    assert second.json["usage"]["image_tokens"] == size[0] * size[1] // 1024
    assert both.json["usage"]["image_tokens"] == (1344 * 960 + size[0] * size[1]) // 1024


TRUNCATED = film("mp4", "libx264", 40, sound="aac")[:-3000]


@pytest.mark.parametrize(
    ("model", "hostile", "says"),
    [
        (
            V4,
            {"image": BAD["100 megapixels in 12 KB"].make()},
            "image of input 1 cannot be used: it has 10,000",
        ),
        (V4, {"image": TRUNCATED}, "image of input 1 cannot be used: it is MP4 or QuickTime, not an image"),
        (NANO, {"image": BAD["truncated JPEG"].make()}, "image of input 1 cannot be used"),
        (NANO, {"video": TRUNCATED}, "video of input 1 cannot be used"),
        (NANO, {"video": b"\x1a\x45\xdf\xa3" + bytes(4000)}, "video of input 1 cannot be used: it is broken"),
        (NANO, {"audio": FILM}, "audio of input 1 cannot be used: it is a film"),
    ],
    ids=["vast", "film to v4", "cut JPEG", "cut film", "broken film", "film as a sound"],
)
def test_a_hostile_input_is_named_and_the_next_call_served(
    api: Api, model: str, hostile: dict[str, bytes], says: str
) -> None:
    item = {name: text(data) for name, data in hostile.items()}
    refused = api.embed(["a dog", item], model=model)
    assert refused.error() == (400, "INPUT_INVALID")
    assert says in refused.json["detail"]
    kind = next(iter(hostile))
    good = {"image": SMALL, "video": FILM, "audio": TONE}[kind]
    assert vectors(api.embed(["a dog", {kind: text(good)}], model=model)).shape[0] == 2


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (BAD["100 megapixels in 12 KB"].make(), "image of document 1 cannot be used: it has 10,000"),
        (TRUNCATED, "image of document 1 cannot be used: it is MP4 or QuickTime, not an image"),
    ],
    ids=["vast", "film"],
)
def test_a_hostile_document_is_named_and_the_next_call_served(api: Api, hostile: bytes, says: str) -> None:
    refused = api.rerank(TEXT, ["a dog", {"image": text(hostile)}], model=M0)
    assert refused.error() == (400, "INPUT_INVALID")
    assert says in refused.json["detail"]
    assert api.rerank(TEXT, ["a dog", {"image": text(SMALL)}], model=M0).status == 200


@pytest.mark.parametrize("model", [V4, M0])
def test_a_kind_that_a_model_does_not_take_is_named(api: Api, model: str) -> None:
    item = {"video": text(FILM)}
    asked = (
        api.rerank(TEXT, ["a dog", item], model=M0) if model == M0 else api.embed(["a dog", item], model=V4)
    )
    assert asked.error() == (422, "VALIDATION_ERROR")
    assert "-> 1" in asked.body.decode()

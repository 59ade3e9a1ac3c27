"""jina-embeddings-v5-omni through the doors of the embedding service, beside transformers' own classes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import orjson
import pytest
import pytest_asyncio
from google.api import httpbody_pb2
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc, embed_rest_pb2_grpc

from services.embed.capability import build
from tests.media.films import sound
from tests.media.pictures import A4, pdf, photograph
from tests.omni_checkpoints import NANO, SMALL, write_served
from tests.omni_references import FILM, FIT, TONE, filmed, heard, omni, photo
from tests.rig import Serving, serving, settings, told

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in (NANO, SMALL):
        write_served(folder, model)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(models: Path) -> AsyncIterator[Serving]:
    chosen = settings(models=(NANO, SMALL), model_dir=models, media_decoders=2)
    async with serving(build, chosen) as serving_:
        yield serving_


async def rest(up: Serving, model: str, value: Any, **options: Any) -> dict[str, Any]:
    stub: Any = embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel)
    body = orjson.dumps({"model": model, "input": value, **options})
    response = await stub.CreateEmbeddings(httpbody_pb2.HttpBody(content_type="application/json", data=body))
    return orjson.loads(response.data)


def vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return np.array([item["embedding"] for item in answer["data"]])


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def content(**fields: Any) -> common_pb2.Content:
    return common_pb2.Content(**fields)


@pytest.mark.parametrize("model", [NANO, SMALL])
async def test_every_kind_through_rest(up: Serving, models: Path, model: str) -> None:
    group = [{"text": "see "}, {"video": text(FILM)}, {"audio": text(TONE)}, {"text": "a dog"}]
    value = [
        "hello world",
        {"image": text(photograph())},
        {"audio": text(TONE)},
        {"video": text(FILM)},
        {"content": group},
        {"content": group[::-1]},
    ]
    answered = await rest(up, model, value, task="retrieval.query")
    found = vectors(answered)
    reference = omni(models / model, "retrieval")
    parts = ["see ", filmed(), heard(), "a dog"]
    wanted = [
        reference.vector(["hello world"], "Query: "),
        *(reference.vector([each]) for each in (photo(), heard(), filmed())),
        reference.vector(parts),
        reference.vector(parts[::-1]),
    ]
    np.testing.assert_allclose(found, [unit(each) for each in wanted], atol=1e-5)
    assert found[4] @ found[5] < 0.999
    usage = answered["usage"]
    # 640 x 416 pixels, 40 spectra, and two pairs of frames of 320 x 320.
    assert usage["image_tokens"] == 260
    assert usage["audio_tokens"] == 3 * 10
    assert usage["video_tokens"] == 3 * 2 * 100
    assert usage["total_tokens"] == usage["prompt_tokens"] > 260 + 30 + 600
    assert up.access.charged[-1] == usage["total_tokens"]


async def test_the_task_changes_media(up: Serving, models: Path) -> None:
    tasks = ("retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification")
    answers = await asyncio.gather(
        *(rest(up, NANO, [{"audio": text(TONE)}], task=task) for task in tasks for _ in range(3))
    )
    found = np.concatenate([vectors(answer) for answer in answers]).reshape(len(tasks), 3, -1)
    for task, several in zip(tasks, found, strict=True):
        wanted = unit(omni(models / NANO, task.split(".")[0]).vector([heard()]))
        np.testing.assert_allclose(several, [wanted] * 3, atol=1e-5)
    short = vectors(await rest(up, NANO, {"audio": text(TONE)}, dimensions=64))
    np.testing.assert_allclose(short[0], unit(found[2, 0, :64]), atol=1e-5)


async def test_a_pdf_gives_a_vector_for_each_page(up: Serving) -> None:
    document = pdf((300.0, 200.0), A4)
    answered = await rest(up, NANO, {"pdf": text(document)})
    assert vectors(answered).shape == (2, 768)
    size = FIT.size(625, 417)
    assert answered["usage"]["image_tokens"] == (size[0] * size[1] + 1344 * 960) // 1024
    one = vectors(await rest(up, NANO, {"pdf": text(pdf((300.0, 200.0)))}))
    np.testing.assert_allclose(vectors(answered)[0], one[0], atol=1e-6)


async def refused(up: Serving, model: str, value: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest(up, model, value)
    return told(error.value)


async def test_what_cannot_be_taken_is_named(up: Serving) -> None:
    before = list(up.access.charged)
    for value, code, says in (
        (["a", {"audio": text(sound(0.02))}], "INPUT_INVALID", "Input 1 cannot be used: A sound of 20 ms"),
        (["a", {"audio": text(FILM)}], "INPUT_INVALID", "The audio of input 1 cannot be used: it is a film"),
        (
            [{"content": [{"text": "a"}, {"video": text(photograph())}]}],
            "INPUT_INVALID",
            "The video of part 1 of input 0 cannot be used: it is JPEG",
        ),
        (
            ["a", {"content": [{"image": text(photograph())}] * 33}],
            "INPUT_TOKEN_LIMIT_EXCEEDED",
            "Input 1 has 8581 tokens, the model takes at most 8192",
        ),
    ):
        status, body = await refused(up, NANO, value)
        assert status == 400
        assert body["code"] == code
        assert says in body["detail"]
    status, body = await refused(up, NANO, [{"content": [{"pdf": text(pdf(A4))}]}])
    assert status == 422
    assert up.access.charged == before


async def test_typed_calls_and_the_stream_take_bytes(up: Serving) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    media = common_pb2.Media
    group = common_pb2.ContentGroup(
        parts=[
            common_pb2.ContentPart(text="see "),
            common_pb2.ContentPart(video=media(data=FILM)),
            common_pb2.ContentPart(audio=media(data=TONE)),
        ]
    )
    inputs = [content(audio=media(data=TONE)), content(video=media(data=FILM)), content(group=group)]
    answered = await stub.Embed(embed_pb2.EmbedRequest(model=SMALL, inputs=inputs))
    found = np.array([each.dense.values for each in answered.embeddings])
    same = [
        {"audio": text(TONE)},
        {"video": text(FILM)},
        {"content": [{"text": "see "}, {"video": text(FILM)}, {"audio": text(TONE)}]},
    ]
    np.testing.assert_allclose(found, vectors(await rest(up, SMALL, same)), atol=1e-6)
    assert (answered.usage.audio_tokens, answered.usage.video_tokens) == (20, 2 * 2 * 100)
    requests = [
        embed_pb2.EmbedStreamRequest(model=SMALL, input=each)
        for each in (inputs[0], content(video=media(data=TONE)), inputs[2])
    ]
    answers = [each async for each in stub.EmbedStream(iter(requests))]
    assert [each.WhichOneof("outcome") for each in answers] == ["result", "error", "result"]
    np.testing.assert_allclose(answers[2].result.embeddings[0].dense.values, found[2], atol=1e-6)

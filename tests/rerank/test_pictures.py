"""jina-reranker-m0 behind both doors: texts and pictures in one request, against transformers in float64."""

from __future__ import annotations

import base64
import io
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
from PIL import Image as Pillow
from searchfoundation.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc, rerank_rest_pb2_grpc

from services.rerank.capability import build
from tests import vision_references as reference
from tests.media.pictures import BAD, noise, photograph, saved
from tests.media.web import answer, web
from tests.rig import Serving, serving, settings, told
from tests.vision_checkpoints import M0, write_served

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY = "the quick brown fox"
LIMITS = (3136, 602_112)
FLOWER = photograph("flower.jpg")
SMALL = saved(noise(90, 60))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_served(folder, M0)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(models: Path) -> AsyncIterator[Serving]:
    chosen = settings(models=(M0,), model_dir=models, fetch_allow_networks=("127.0.0.1/32",))
    async with serving(build, chosen) as serving_:
        yield serving_


async def rest(up: Serving, documents: Any, query: Any = QUERY, **options: Any) -> dict[str, Any]:
    stub: Any = rerank_rest_pb2_grpc.RerankRestServiceStub(up.channel)
    body = orjson.dumps({"model": M0, "query": query, "documents": documents, **options})
    response = await stub.Rerank(httpbody_pb2.HttpBody(content_type="application/json", data=body))
    return orjson.loads(response.data)


def opened(data: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(data)).convert("RGB")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wanted(models: Path, documents: list[Any], query: Any = QUERY) -> np.ndarray:
    return np.array([reference.score(models / M0, query, each, limits=LIMITS) for each in documents])


async def test_texts_and_pictures_in_one_request(up: Serving, models: Path) -> None:
    async with web(answer(FLOWER)) as site:
        sent = [
            "a dog",
            {"image": text(SMALL), "id": 7},
            {"text": "hello world", "page": 3},
            {"image": site.url("/flower.jpg")},
            {"image": f"data:image/png;base64,{text(SMALL)}"},
        ]
        answered = await rest(up, sent)
    scores = {each["index"]: each["relevance_score"] for each in answered["results"]}
    documents = ["a dog", opened(SMALL), "hello world", opened(FLOWER), opened(SMALL)]
    expected = wanted(models, documents)
    np.testing.assert_allclose([scores[i] for i in range(5)], expected, atol=2e-5)
    assert [each["index"] for each in answered["results"]] == np.argsort(-expected, kind="stable").tolist()
    for each in answered["results"]:
        assert each["document"] == sent[each["index"]]
    _, ids = reference.states(models / M0, "m0", QUERY + "a dog" + "hello world", [], limits=LIMITS)
    small, flower = 2 * 3, 345
    total = len(ids) + 2 * (small + 2) + flower + 2
    assert answered["usage"] == {"total_tokens": total, "image_tokens": 2 * small + flower}


async def test_a_picture_asks_and_few_are_answered(up: Serving, models: Path) -> None:
    documents = ["a dog", {"image": text(FLOWER)}]
    answered = await rest(up, documents, {"image": text(SMALL)}, top_n=1, return_documents=False)
    expected = wanted(models, ["a dog", opened(FLOWER)], opened(SMALL))
    (only,) = answered["results"]
    assert only == {"index": int(expected.argmax()), "relevance_score": only["relevance_score"]}
    assert abs(only["relevance_score"] - expected.max()) < 2e-5


async def test_the_typed_door_and_the_stream_answer_alike(up: Serving) -> None:
    stub: Any = rerank_pb2_grpc.RerankServiceStub(up.channel)
    contents = [
        common_pb2.Content(text="a dog"),
        common_pb2.Content(image=common_pb2.Media(data=SMALL)),
    ]
    asked = common_pb2.Content(text=QUERY)
    typed = await stub.Rerank(rerank_pb2.RerankRequest(model=M0, query=asked, documents=contents))
    plain = await rest(up, ["a dog", {"image": text(SMALL)}])
    assert [round(each.relevance_score, 6) for each in typed.results] == [
        round(each["relevance_score"], 6) for each in plain["results"]
    ]
    assert [each.document for each in typed.results] == [contents[each.index] for each in typed.results]
    assert typed.usage.total_tokens == plain["usage"]["total_tokens"]
    assert typed.usage.image_tokens == plain["usage"]["image_tokens"] == 2 * 3

    async def parts() -> AsyncIterator[rerank_pb2.RerankStreamRequest]:
        yield rerank_pb2.RerankStreamRequest(start=rerank_pb2.RerankStart(model=M0, query=asked))
        for content in contents:
            yield rerank_pb2.RerankStreamRequest(documents=rerank_pb2.RerankDocuments(documents=[content]))

    streamed = await stub.RerankStream(parts())
    assert [each.index for each in streamed.results] == [each.index for each in typed.results]


async def test_bad_pictures_are_refused_by_name(up: Serving) -> None:
    for name, bad in BAD.items():
        if bad.field != "image" or name == "empty":
            continue
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(up, ["a dog", {"image": text(bad.make())}])
        status, body = told(caught.value)
        assert status == 400
        assert bad.says in body["detail"]
    assert len((await rest(up, ["a dog"]))["results"]) == 1

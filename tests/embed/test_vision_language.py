"""jina-embeddings-v4 behind both doors: texts, pictures, pages, tokens, against transformers in float64."""

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
from google.rpc import error_details_pb2
from PIL import Image as Pillow
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc, embed_rest_pb2_grpc
from tokenizers import Tokenizer

from services.core.call import Call
from services.core.catalog.types import Modality
from services.core.content import Media
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions
from services.embed.capability import build
from tests import vision_references as reference
from tests.media.pictures import A4, BAD, noise, pdf, saved
from tests.rig import Serving, detail, serving, settings, told
from tests.vision_checkpoints import MAX_PIXELS, V4, write_served

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = (3136, MAX_PIXELS)
ADAPTERS = {"text-matching": "text-matching", "retrieval.passage": "retrieval", "code.query": "code"}
SMALL, LARGE = saved(noise(90, 60)), saved(noise(300, 220, 1))
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_served(folder, V4)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(models: Path) -> AsyncIterator[Serving]:
    async with serving(build, settings(models=(V4,), model_dir=models)) as serving_:
        yield serving_


async def rest(up: Serving, value: Any, **options: Any) -> dict[str, Any]:
    stub: Any = embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel)
    body = orjson.dumps({"model": V4, "input": value, **options})
    response = await stub.CreateEmbeddings(httpbody_pb2.HttpBody(content_type="application/json", data=body))
    return orjson.loads(response.data)


async def refused(up: Serving, value: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest(up, value, **options)
    return told(error.value)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(data: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(data)).convert("RGB")


def wanted(models: Path, what: Any, task: str = "text-matching", **options: Any) -> np.ndarray:
    prompt = "Passage: " if task.endswith("passage") else "Query: "
    adapter = ADAPTERS[task]
    return reference.embedding(models / V4, what, task=adapter, limits=LIMITS, prompt=prompt, **options)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("task", [None, "retrieval.passage", "code.query"])
async def test_texts_and_pictures_keep_their_places(up: Serving, models: Path, task: str | None) -> None:
    value = [TEXT, {"image": text(SMALL)}, {"text": "a dog"}, {"image": text(LARGE)}]
    answered = await rest(up, value, task=task)
    found = np.array([item["embedding"] for item in answered["data"]])
    given = [TEXT, opened(SMALL), "a dog", opened(LARGE)]
    expected = [wanted(models, each, task or "text-matching") for each in given]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (4, 2048)
    usage = answered["usage"]
    # 84 x 56 pixels are three by two states, 252 x 168 are nine by six.
    assert usage["image_tokens"] == 6 + 54
    assert usage["total_tokens"] == usage["prompt_tokens"] > usage["image_tokens"]


async def test_dimensions_and_encodings(up: Serving, models: Path) -> None:
    value = [TEXT, {"image": text(SMALL)}]
    full = [wanted(models, each) for each in (TEXT, opened(SMALL))]
    for dimensions in (128, 77):
        answered = await rest(up, value, dimensions=dimensions)
        found = np.array([item["embedding"] for item in answered["data"]])
        np.testing.assert_allclose(found, [unit(each[:dimensions]) for each in full], atol=1e-5)
    answered = await rest(up, value, embedding_type=["float", "base64"])
    for item in answered["data"]:
        packed = np.frombuffer(base64.b64decode(item["embeddings_by_type"]["base64"]), "<f4")
        np.testing.assert_allclose(packed, item["embedding"], atol=1e-6)


async def test_a_vector_for_each_token(up: Serving, models: Path) -> None:
    value = [TEXT, {"image": text(SMALL)}]
    answered = await rest(up, value, return_multivector=True, return_tokenized_input=True)
    tokenizer = Tokenizer.from_file(str(models / V4 / "tokenizer.json"))
    for item, given in zip(answered["data"], (TEXT, opened(SMALL)), strict=True):
        assert item["object"] == "embeddings"
        expected = wanted(models, given, multivector=True)
        np.testing.assert_allclose(item["embeddings"], expected, atol=1e-5)
        assert len(item["tokenized_input"]) == len(expected)
    tokens = [item["tokenized_input"] for item in answered["data"]]
    assert tokens[0] == tokenizer.encode("Query: " + TEXT).tokens
    assert tokens[1].count("<|image_pad|>") == 6
    plain = await rest(up, value, return_multivector=True, embedding_type="base64")
    assert "tokenized_input" not in plain["data"][0]
    for item, other in zip(plain["data"], answered["data"], strict=True):
        packed = [np.frombuffer(base64.b64decode(row), "<f4") for row in item["embeddings"]]
        np.testing.assert_allclose(packed, other["embeddings"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"return_multivector": True, "dimensions": 128},
            "Incompatible options: 'dimensions' cannot be set when 'return_multivector' is True",
        ),
        (
            {"return_tokenized_input": True},
            "Incompatible options: 'return_tokenized_input' requires 'return_multivector' to be True",
        ),
        (
            {"return_multivector": True, "late_chunking": True},
            "Incompatible options: 'late_chunking' cannot be set when 'return_multivector' is True",
        ),
        (
            {"late_chunking": True, "input": [TEXT, {"image": text(SMALL)}]},
            "'late_chunking' reads texts only",
        ),
    ],
)
async def test_what_does_not_go_together(up: Serving, options: dict[str, Any], says: str) -> None:
    value = options.pop("input", TEXT) if "input" in options else TEXT
    status, body = await refused(up, value, **options)
    assert status == 422
    assert says in orjson.dumps(body).decode()


async def test_chunks_know_their_neighbours(up: Serving, models: Path) -> None:
    value = ["the quick", " brown fox"]
    answered = await rest(up, value, late_chunking=True, task="retrieval.passage")
    found = np.array([item["embedding"] for item in answered["data"]])
    tokenizer = Tokenizer.from_file(str(models / V4 / "tokenizer.json"))
    hidden, ids = reference.states(
        models / V4, V4, "Passage: the quick brown fox", [], task="retrieval", limits=LIMITS
    )
    first = len(tokenizer.encode("Passage: the quick").ids)
    assert len(ids) == first + len(tokenizer.encode(" brown fox").ids)
    expected = [unit(hidden[:first].mean(0).numpy()), unit(hidden[first:].mean(0).numpy())]
    np.testing.assert_allclose(found, expected, atol=1e-5)


async def test_a_pdf_gives_a_vector_for_each_page(up: Serving) -> None:
    answered = await rest(up, {"pdf": text(pdf(A4, (300.0, 200.0)))})
    assert [item["index"] for item in answered["data"]] == [0, 1]
    several = await rest(up, {"pdf": text(pdf(A4))}, return_multivector=True)
    # 1240 x 1755 pixels at 150 dpi become 168 x 252 within the bound.
    assert len(several["data"][0]["embeddings"]) == several["usage"]["total_tokens"]
    assert several["usage"]["image_tokens"] == 54


async def test_typed_calls_and_the_stream(up: Serving, models: Path) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    contents = [common_pb2.Content(text=TEXT), common_pb2.Content(image=common_pb2.Media(data=SMALL))]
    options = embed_pb2.EmbedOptions(
        task=common_pb2.TASK_RETRIEVAL_PASSAGE, return_multivector=True, return_tokenized_input=True
    )
    answered = await stub.Embed(embed_pb2.EmbedRequest(model=V4, inputs=contents, options=options))
    expected = [wanted(models, each, "retrieval.passage", multivector=True) for each in (TEXT, opened(SMALL))]
    for each, vectors in zip(answered.embeddings, expected, strict=True):
        np.testing.assert_allclose([row.values for row in each.multi.vectors], vectors, atol=1e-5)
        assert len(each.multi.tokens) == len(vectors)
    assert answered.usage.image_tokens == 6

    async def messages() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        for content in contents:
            yield embed_pb2.EmbedStreamRequest(model=V4, input=content)

    streamed = [each async for each in stub.EmbedStream(messages())]
    for each, what in zip(streamed, (TEXT, opened(SMALL)), strict=True):
        (one,) = each.result.embeddings
        np.testing.assert_allclose(one.dense.values, wanted(models, what), atol=1e-5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        options = embed_pb2.EmbedOptions(return_multivector=True, dimensions=8)
        await stub.Embed(embed_pb2.EmbedRequest(model=V4, inputs=contents, options=options))
    assert detail(caught.value, error_details_pb2.BadRequest).field_violations


async def test_bad_pictures_are_refused_by_name(up: Serving) -> None:
    for name, bad in BAD.items():
        if name == "empty":
            continue
        value: Any = {bad.field: text(bad.make())}
        status, body = await refused(up, ["a dog", value] if bad.field == "image" else value)
        assert status == 400
        assert bad.says in body["detail"]
    assert len((await rest(up, ["a dog"]))["data"]) == 1


async def test_late_chunks_of_pictures_are_refused_inside_too(up: Serving) -> None:
    with pytest.raises(ServiceError) as caught:
        picture = Media(Modality.IMAGE, text(SMALL))
        await up.engine.embedder(V4).embed([picture], EmbedOptions(late_chunking=True), Call("test"))
    assert caught.value.code is ErrorCode.INPUT_INVALID

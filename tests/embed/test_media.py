"""Pictures and PDFs through both doors of the embedding service, beside references in float64."""

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
from tests import clip_references as reference
from tests.clip_checkpoints import TASK, V1, V2, write_model
from tests.media.pictures import A4, noise, pdf, photograph, saved
from tests.media.web import Request, answer, head, web
from tests.rig import Serving, serving, settings, told
from tests.text_checkpoints import INSTRUCTIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHOTOGRAPH = photograph()
FLOWER = photograph("flower.jpg")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in (V1, V2):
        write_model(folder, model)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(models: Path) -> AsyncIterator[Serving]:
    chosen = settings(
        models=(V1, V2, "all-MiniLM-L6-v2"),
        model_dir=models,
        fetch_allow_networks=("127.0.0.1/32",),
        media_decoders=2,
        media_max_bytes=1 << 20,
    )
    async with serving(build, chosen) as serving_:
        yield serving_


async def rest(up: Serving, model: str, value: Any, **options: Any) -> dict[str, Any]:
    stub: Any = embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel)
    body = orjson.dumps({"model": model, "input": value, **options})
    response = await stub.CreateEmbeddings(httpbody_pb2.HttpBody(content_type="application/json", data=body))
    return orjson.loads(response.data)


async def refused(up: Serving, model: str, value: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest(up, model, value)
    return told(error.value)


def vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return np.array([item["embedding"] for item in answer["data"]])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("model", [V1, V2])
async def test_texts_and_pictures_keep_their_places(up: Serving, models: Path, model: str) -> None:
    async with web(answer(FLOWER)) as site:
        value = [
            "hello world",
            {"image": text(PHOTOGRAPH)},
            {"text": "a dog"},
            {"image": site.url("/flower.jpg")},
            "the quick brown fox",
            {"image": f"data:image/jpeg;base64,{text(PHOTOGRAPH)}"},
        ]
        answered = await rest(up, model, value)
    folder = models / model
    wanted = [
        reference.text_vector(folder, "hello world"),
        reference.image_vector(folder, PHOTOGRAPH),
        reference.text_vector(folder, "a dog"),
        reference.image_vector(folder, FLOWER),
        reference.text_vector(folder, "the quick brown fox"),
        reference.image_vector(folder, PHOTOGRAPH),
    ]
    np.testing.assert_allclose(vectors(answered), [unit(each) for each in wanted], atol=1e-5)
    # Tiles over 640 x 427: three by two of 224 pixels, two by one of 512.
    images = 3 * (6 * 1000 if model == V1 else 2 * 4000)
    texts = sum(len(reference.token_ids(folder, t)) for t in ("hello world", "a dog", "the quick brown fox"))
    total = images + texts
    assert answered["usage"] == {"total_tokens": total, "prompt_tokens": total, "image_tokens": images}


async def test_options_are_those_of_texts(up: Serving, models: Path) -> None:
    folder = models / V2
    value = ["a dog", {"image": text(PHOTOGRAPH)}]
    plain = [
        reference.text_vector(folder, "a dog", INSTRUCTIONS[TASK]),
        reference.image_vector(folder, PHOTOGRAPH),
    ]
    short = vectors(await rest(up, V2, value, task=TASK, dimensions=64))
    np.testing.assert_allclose(short, [unit(each[:64]) for each in plain], atol=1e-5)
    raw = vectors(await rest(up, V2, value, task=TASK, normalized=False))
    np.testing.assert_allclose(raw, plain, atol=2e-5)


async def test_every_type_of_embedding(up: Serving) -> None:
    value = [{"image": text(PHOTOGRAPH)}, "hello"]
    types = ["float", "base64", "binary", "ubinary"]
    answered = await rest(up, V1, value, embedding_type=types)
    for item in answered["data"]:
        each = item["embeddings_by_type"]
        numbers = np.array(each["float"], np.float32)
        assert np.array_equal(np.frombuffer(base64.b64decode(each["base64"]), "<f4"), numbers)
        bits = np.packbits(numbers > 0)
        assert each["ubinary"] == bits.tolist()
        assert each["binary"] == (bits.astype(int) - 128).tolist()


@pytest.mark.parametrize(
    "write",
    [
        lambda data, url: {"image": data},
        lambda data, url: {"image": url},
        lambda data, url: {"image": {"url": url}},
        lambda data, url: {"image": {"bytes": data}},
        lambda data, url: {"image_base64": data},
        lambda data, url: {"image_url": url},
        lambda data, url: {"type": "image_url", "image_url": {"url": url}},
        lambda data, url: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        lambda data, url: {"type": "image", "format": "base64", "value": data},
        lambda data, url: {"url": url},
        lambda data, url: {"bytes": data},
    ],
)
async def test_names_of_other_servers_and_clients(up: Serving, write: Any) -> None:
    picture = saved(noise(30, 20))
    async with web(answer(picture)) as site:
        one = vectors(await rest(up, V1, write(text(picture), site.url())))
    assert np.array_equal(one, vectors(await rest(up, V1, [{"image": text(picture)}])))


async def test_a_bare_data_uri_is_a_picture_and_as_text_a_text(up: Serving, models: Path) -> None:
    uri = f"data:image/png;base64,{text(saved(noise(2, 2)))}"
    found = vectors(await rest(up, V1, [uri, {"image": uri}]))
    assert np.array_equal(found[0], found[1])
    wanted = unit(reference.text_vector(models / V1, uri))
    written = vectors(await rest(up, V1, {"text": uri}, truncate=True))
    np.testing.assert_allclose(written[0], wanted, atol=1e-5)


async def test_a_pdf_gives_a_vector_for_each_page(up: Serving) -> None:
    document = pdf(A4, (300.0, 200.0), A4)
    answered = await rest(up, V1, {"pdf": text(document)})
    three = vectors(answered)
    assert three.shape == (3, 768)
    assert len(np.unique(three.round(4), axis=0)) == 3
    # 1240 x 1755 and 625 x 417 pixels.
    assert answered["usage"]["image_tokens"] == 1000 * (2 * 6 * 8 + 3 * 2)
    pages = [vectors(await rest(up, V1, {"pdf": text(pdf(A4))}))[0]]
    np.testing.assert_allclose(three[:1], pages, atol=1e-6)


async def test_a_pdf_beside_others_is_refused(up: Serving) -> None:
    status, body = await refused(up, V1, ["hello", {"pdf": text(pdf(A4))}])
    assert status == 422
    assert body["errors"][0]["field"] == "body -> jina-clip-v1 -> input -> 1 -> pdf"
    assert "A PDF must be the only input" in body["detail"]


@pytest.mark.parametrize(
    ("model", "value", "field", "says"),
    [
        ("all-MiniLM-L6-v2", [{"image": "AAAA"}], "input -> 0", "takes text only, not 'image'"),
        (V1, [{"audio": "AAAA"}], "input -> 0", "does not take 'audio'"),
        (V1, [{"content": ["a"]}], "input -> 0", "does not take 'content'"),
        (V1, ["a", {"image": 7}], "input -> 1 -> image", "valid string"),
        (V1, [{"image": None}], "input -> 0 -> image", "valid string"),
        (V1, [{"image": {"href": "x"}}], "input -> 0 -> image -> url", "valid string"),
        (V1, [{}], "input -> 0 -> text", "required"),
        (V1, ["a", 5.5], "input -> 1", "object with 'text', 'image' or 'pdf'"),
    ],
)
async def test_what_a_model_does_not_take_is_told_by_place(
    up: Serving, model: str, value: Any, field: str, says: str
) -> None:
    status, body = await refused(up, model, value)
    assert status == 422
    assert body["errors"][0]["field"] == f"body -> {model} -> {field}"
    assert says in body["errors"][0]["message"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("not base64!", "it is neither a URL nor base64"),
        ("http://10.0.0.1/a.png", "an address that is not public"),
        ("A" * (2 << 20), "larger than 1,048,576 bytes"),
        (text(b"<svg/>"), "SVG is not read"),
    ],
)
async def test_what_cannot_be_opened_is_a_400_that_names_the_input(
    up: Serving, value: str, says: str
) -> None:
    status, body = await refused(up, V2, ["hello", {"image": value}])
    assert status == 400
    assert body["code"] == "INPUT_INVALID"
    assert body["detail"].startswith("The image of input 1 cannot be used: ")
    assert says in body["detail"]


async def test_nothing_is_charged_for_what_cannot_be_opened(up: Serving) -> None:
    before = list(up.access.charged)
    await refused(up, V1, [{"image": "wrong!"}])
    assert up.access.charged == before
    answered = await rest(up, V1, [{"image": text(saved(noise(9, 9)))}])
    assert up.access.charged == [*before, answered["usage"]["total_tokens"]]


def content(**fields: Any) -> common_pb2.Content:
    return common_pb2.Content(**fields)


async def test_typed_calls_take_bytes(up: Serving, models: Path) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    async with web(answer(FLOWER)) as site:
        answered = await stub.Embed(
            embed_pb2.EmbedRequest(
                model=V2,
                inputs=[
                    content(image=common_pb2.Media(data=PHOTOGRAPH)),
                    content(text="a dog"),
                    content(image=common_pb2.Media(url=site.url(), mime_type="image/png")),
                ],
            )
        )
    found = np.array([each.dense.values for each in answered.embeddings])
    folder = models / V2
    wanted = [
        reference.image_vector(folder, PHOTOGRAPH),
        reference.text_vector(folder, "a dog"),
        reference.image_vector(folder, FLOWER),
    ]
    np.testing.assert_allclose(found, [unit(each) for each in wanted], atol=1e-5)
    assert answered.usage.image_tokens == 16_000
    only_text = await stub.Embed(embed_pb2.EmbedRequest(model=V2, inputs=[content(text="a")]))
    assert not only_text.usage.HasField("image_tokens")
    spent = answered.timings
    assert all(each.ToNanoseconds() > 0 for each in (spent.fetch, spent.decode, spent.inference))
    assert only_text.timings.fetch.ToNanoseconds() == only_text.timings.decode.ToNanoseconds() == 0


async def test_stages_of_media_are_told_where_there_are_media(up: Serving) -> None:
    stub: Any = embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel)

    async def stages(value: Any) -> dict[str, float]:
        body = orjson.dumps({"model": V1, "input": value})
        call = stub.CreateEmbeddings(httpbody_pb2.HttpBody(content_type="application/json", data=body))
        headers = dict(await call.initial_metadata())
        await call
        said = [each.split(";dur=") for each in headers["server-timing"].split(", ")]
        return {name: float(milliseconds) for name, milliseconds in said}

    async with web(answer(FLOWER)) as site:
        fetched = await stages([{"image": site.url()}])
    assert list(fetched) == ["fetch", "decode", "tokenize", "queue", "inference", "total"]
    assert 0 < fetched["fetch"] < fetched["total"]
    assert 0 < fetched["decode"] < fetched["total"]
    sent = await stages(["a dog", {"image": text(PHOTOGRAPH)}])
    assert sent["fetch"] == 0 < sent["decode"]
    assert list(await stages(["a dog"])) == ["tokenize", "queue", "inference", "total"]


async def test_a_typed_pdf_gives_its_pages(up: Serving) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    document = content(pdf=common_pb2.Media(data=pdf(A4, A4)))
    answered = await stub.Embed(embed_pb2.EmbedRequest(model=V1, inputs=[document]))
    assert [each.index for each in answered.embeddings] == [0, 1]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Embed(embed_pb2.EmbedRequest(model=V1, inputs=[content(text="a"), document]))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "inputs[1]" in (error.value.details() or "")


async def test_typed_media_that_are_wrong_are_told_by_place(up: Serving) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    for wrong, says in (
        (content(image=common_pb2.Media()), "it is empty"),
        (content(audio=common_pb2.Media(data=b"x")), "does not take 'audio'"),
        (content(group=common_pb2.ContentGroup()), "does not take 'content'"),
        (content(image=common_pb2.Media(data=b"nothing")), "The image of input 0 cannot be used"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Embed(embed_pb2.EmbedRequest(model=V1, inputs=[wrong]))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert says in (error.value.details() or "")


async def test_a_stream_takes_pictures_and_pdfs(up: Serving, models: Path) -> None:
    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    inputs = [
        content(image=common_pb2.Media(data=PHOTOGRAPH)),
        content(image=common_pb2.Media(data=b"broken")),
        content(pdf=common_pb2.Media(data=pdf(A4, A4))),
        content(text="a dog"),
    ]
    requests = [embed_pb2.EmbedStreamRequest(model=V1, input=each) for each in inputs]
    answers = [each async for each in stub.EmbedStream(iter(requests))]
    assert [each.WhichOneof("outcome") for each in answers] == ["result", "error", "result", "result"]
    assert [len(each.result.embeddings) for each in answers] == [1, 0, 2, 1]
    wanted = unit(reference.image_vector(models / V1, PHOTOGRAPH))
    np.testing.assert_allclose(answers[0].result.embeddings[0].dense.values, wanted, atol=1e-5)


async def test_a_cancelled_call_stops_fetching(up: Serving) -> None:
    started = asyncio.Event()

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1 << 19))
        started.set()
        while True:
            writer.write(bytes(100))
            await writer.drain()
            await asyncio.sleep(0.01)

    stub: Any = embed_pb2_grpc.EmbedServiceStub(up.channel)
    async with web(slow) as site:
        picture = content(image=common_pb2.Media(url=site.url()))
        call = stub.Embed(embed_pb2.EmbedRequest(model=V1, inputs=[picture]))
        waiting = asyncio.ensure_future(call)
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await site.gone.wait()
    assert len((await rest(up, V1, [{"image": text(saved(noise(9, 9)))}]))["data"]) == 1

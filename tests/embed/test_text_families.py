"""Tasks, late chunking, token vectors and sparse vectors through both doors, over tiny checkpoints."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import orjson
import pytest
import pytest_asyncio
import torch
from google.api import httpbody_pb2
from google.rpc import error_details_pb2
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc, embed_rest_pb2_grpc

from gateway.openapi import build_openapi
from services.core.catalog import Catalog
from services.core.catalog.types import Capability
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from services.core.openapi.parts import Bounds
from services.embed.capability import build
from tests.described import Described
from tests.rig import detail, serving, settings, told
from tests.text_checkpoints import write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

V2, V3, COLBERT, ELSER = "jina-embeddings-v2-base-en", "jina-embeddings-v3", "jina-colbert-v2", "elser-v2"
MODELS = (V2, V3, COLBERT, ELSER)
TEXTS = ["the quick brown fox", "hello world", "a dog, a fox."]
TOP = 5

CATALOG = Catalog.load()
DESCRIBED = Described(
    build_openapi({Capability.EMBED: CATALOG.select(MODELS)}, Bounds(items=400)), "/v1/embeddings"
)


@dataclass
class Rig:
    folder: Path
    typed: embed_pb2_grpc.EmbedServiceAsyncStub
    rest: embed_rest_pb2_grpc.EmbedRestServiceAsyncStub

    async def post(self, model: str, input: Any, **fields: Any) -> dict[str, Any]:
        body = orjson.dumps({"model": model, "input": input, **fields})
        DESCRIBED.request.validate(orjson.loads(body))
        answer = orjson.loads((await self.rest.CreateEmbeddings(httpbody_pb2.HttpBody(data=body))).data)
        DESCRIBED.component("EmbeddingResponse").validate(answer)
        return answer

    async def refused(self, model: str, input: Any, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = orjson.dumps({"model": model, "input": input, **fields})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.rest.CreateEmbeddings(httpbody_pb2.HttpBody(data=body))
        return told(caught.value)

    async def embed(self, model: str, *texts: str, **options: Any) -> embed_pb2.EmbedResponse:
        inputs = [common_pb2.Content(text=text) for text in texts]
        return await self.typed.Embed(
            embed_pb2.EmbedRequest(model=model, inputs=inputs, options=embed_pb2.EmbedOptions(**options))
        )

    def network(self, model: str) -> TextEncoder:
        spec = CATALOG.require(model)
        return load_text_encoder(spec, self.folder / model, device=torch.device("cpu"), dtype=torch.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        write_model(folder, model)
    async with serving(build, settings(models=MODELS, model_dir=folder, sparse_top_k=TOP)) as up:
        yield Rig(
            folder,
            embed_pb2_grpc.EmbedServiceStub(up.channel),  # type: ignore[arg-type]
            embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel),  # type: ignore[arg-type]
        )


def vectors(answer: dict[str, Any]) -> np.ndarray:
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


async def test_each_task_has_its_own_vector(rig: Rig) -> None:
    tasks = CATALOG.require(V3).tasks
    answers = [vectors(await rig.post(V3, "hello world", task=task))[0] for task in (None, *tasks)]
    for i, one in enumerate(answers):
        assert one.shape == (1024,)
        for other in answers[:i]:
            assert float(one @ other) < 0.999


async def test_a_v2_model_has_no_tasks_and_ignores_the_field(rig: Rig) -> None:
    plain = vectors(await rig.post(V2, TEXTS))
    assert plain.shape == (3, 768)
    np.testing.assert_array_equal(vectors(await rig.post(V2, TEXTS, task="retrieval.query")), plain)
    network = rig.network(V2)
    items = [EncodeItem(each.ids) for each in network.tokenizer.encode_batch(TEXTS)]
    np.testing.assert_allclose(plain, unit(np.stack(network.forward(items))), atol=1e-5)


async def test_late_chunking_at_both_doors(rig: Rig) -> None:
    task = {"task": "retrieval.passage"}
    plain = vectors(await rig.post(V3, TEXTS, **task))
    answer = await rig.post(V3, TEXTS, late_chunking=True, dimensions=64, **task)
    late = vectors(answer)
    network, prompt = rig.network(V3), CATALOG.require(V3).prompt(task["task"])
    (whole,) = network.tokenizer.encode_batch([prompt + " ".join(TEXTS)])
    bare = [len(each.ids) - 2 for each in network.tokenizer.encode_batch(TEXTS[1:])]
    ends = np.cumsum([len(whole.ids) - 1 - sum(bare), *bare])
    spans = ((0, ends[0]), (ends[0], ends[1]), (ends[1], len(whole.ids)))
    (wanted,) = network.forward([EncodeItem(whole.ids, task["task"], spans)])
    np.testing.assert_allclose(late, unit(np.asarray(wanted)[:, :64]), atol=1e-5)
    assert np.abs(unit(plain[:, :64]) - late).max() > 1e-3
    assert answer["usage"]["total_tokens"] == len(whole.ids)
    typed = await rig.embed(
        V3, *TEXTS, late_chunking=True, dimensions=64, task=common_pb2.TASK_RETRIEVAL_PASSAGE
    )
    np.testing.assert_allclose([each.dense.values for each in typed.embeddings], late, atol=1e-6)


async def test_late_chunking_over_the_context(rig: Rig) -> None:
    long = "hello " * 5000
    status, body = await rig.refused(V3, [long, long], late_chunking=True)
    assert (status, body["code"]) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert "8194" in body["detail"]


@pytest.mark.parametrize("dimensions", [None, 64, 96])
async def test_queries_and_documents_become_token_vectors(rig: Rig, dimensions: int | None) -> None:
    network = rig.network(COLBERT)
    width = dimensions or 128
    for role, tokenizer in (("query", network.query_tokenizer), ("document", network.tokenizer)):
        answer = await rig.post(COLBERT, TEXTS, input_type=role, dimensions=dimensions)
        tokens = tokenizer.encode_batch(TEXTS)
        wanted = network.forward([EncodeItem(each.ids) for each in tokens])
        for index, (item, expected) in enumerate(zip(answer["data"], wanted, strict=True)):
            assert list(item) == ["object", "index", "embeddings"]
            assert (item["object"], item["index"]) == ("embeddings", index)
            found = np.array(item["embeddings"], np.float32)
            np.testing.assert_allclose(found, unit(np.asarray(expected)[:, :width]), atol=1e-5)
            assert role == "document" or found.shape == (32, width)
        counts = [min(each.length, len(each.ids)) for each in tokens]
        assert answer["usage"] == {"total_tokens": sum(counts), "prompt_tokens": sum(counts)}


async def test_a_document_is_what_an_input_is_unless_it_says_otherwise(rig: Rig) -> None:
    assert await rig.post(COLBERT, "hello") == await rig.post(COLBERT, "hello", input_type="document")
    status, body = await rig.refused(COLBERT, "hello", input_type="passage")
    assert (status, body["errors"][0]["field"]) == (422, f"body -> {COLBERT} -> input_type")


async def test_token_vectors_in_every_type(rig: Rig) -> None:
    plain = np.array((await rig.post(COLBERT, "hello world"))["data"][0]["embeddings"], np.float32)
    types = ["base64", "float", "binary", "ubinary"]
    (item,) = (await rig.post(COLBERT, "hello world", embedding_type=types))["data"]
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in item["embeddings"]]
    np.testing.assert_array_equal(decoded, plain)
    by_type = item["embeddings_by_type"]
    assert list(by_type) == types
    assert by_type["base64"] == item["embeddings"]
    bits = np.packbits(plain > 0, axis=1)
    np.testing.assert_array_equal(by_type["ubinary"], bits)
    np.testing.assert_array_equal(by_type["binary"], bits.astype(int) - 128)
    typed = await rig.embed(
        COLBERT,
        "hello world",
        encodings=[common_pb2.VECTOR_ENCODING_FLOAT32_BYTES, common_pb2.VECTOR_ENCODING_UBINARY],
    )
    (embedding,) = typed.embeddings
    assert embedding.WhichOneof("vector") == "multi"
    data = [np.frombuffer(vector.data, "<f4") for vector in embedding.multi.vectors]
    np.testing.assert_array_equal(data, plain)
    (other,) = embedding.multi_alternatives
    assert [vector.data for vector in other.vectors] == [row.tobytes() for row in bits]
    assert {vector.dimensions for vector in other.vectors} == {128}


async def test_a_typed_query_has_its_role(rig: Rig) -> None:
    typed = await rig.embed(COLBERT, "hello", role=common_pb2.INPUT_ROLE_QUERY)
    assert len(typed.embeddings[0].multi.vectors) == 32
    document = await rig.embed(COLBERT, "hello", role=common_pb2.INPUT_ROLE_DOCUMENT)
    assert len(document.embeddings[0].multi.vectors) == 4
    assert typed.usage.total_tokens == 4


async def test_an_unknown_role_is_refused(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.embed(COLBERT, "hello", role=9)  # type: ignore[arg-type]
    (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == "options.role"


async def test_sparse_vectors_at_both_doors(rig: Rig) -> None:
    answer = await rig.post(ELSER, TEXTS, task="retrieval.query")
    network = rig.network(ELSER)
    items = [EncodeItem(each.ids) for each in network.tokenizer.encode_batch(TEXTS)]
    entries = 0
    for item, vector in zip(answer["data"], network.forward(items), strict=True):
        names = network.tokenizer.names(vector.indices.tolist())  # type: ignore[union-attr]
        weights = sorted(zip(names, vector.values.tolist(), strict=True), key=lambda pair: -pair[1])  # type: ignore[union-attr]
        assert list(item["embedding"]) == [name for name, _ in weights[:TOP]]
        assert list(item["embedding"].values()) == pytest.approx([w for _, w in weights[:TOP]], abs=1e-5)
        entries += len(item["embedding"])
    tokens = sum(len(item.token_ids) for item in items)
    assert answer["usage"] == {
        "total_tokens": tokens,
        "input_tokens": tokens,
        "output_tokens": entries,
    }
    typed = await rig.embed(ELSER, *TEXTS)
    for embedding, item in zip(typed.embeddings, answer["data"], strict=True):
        assert dict(zip(embedding.sparse.tokens, embedding.sparse.weights, strict=True)) == pytest.approx(
            item["embedding"], abs=1e-6
        )
    assert (typed.usage.prompt_tokens, typed.usage.output_tokens) == (tokens, entries)


async def test_a_long_text_of_a_sparse_model_is_cut(rig: Rig) -> None:
    assert (await rig.post(ELSER, "hello " * 700))["usage"]["input_tokens"] == 512


@pytest.mark.parametrize("encoding", ["base64", ["float", "binary"]])
async def test_weights_are_always_numbers(rig: Rig, encoding: Any) -> None:
    status, body = await rig.refused(ELSER, "hello", embedding_type=encoding)
    assert status == 422
    assert body["errors"][0]["field"].startswith(f"body -> {ELSER} -> embedding_type")


async def test_a_stream_of_token_vectors(rig: Rig) -> None:
    async def messages() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        options = embed_pb2.EmbedOptions(role=common_pb2.INPUT_ROLE_QUERY)
        for model in (COLBERT, ELSER):
            yield embed_pb2.EmbedStreamRequest(
                model=model, input=common_pb2.Content(text="hello"), options=options
            )

    colbert, elser = [answer async for answer in rig.typed.EmbedStream(messages())]
    assert len(colbert.result.embeddings[0].multi.vectors) == 32
    assert 0 < len(elser.result.embeddings[0].sparse.tokens) <= TOP

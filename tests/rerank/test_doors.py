"""Both doors over the real server, engine and model: the same ranking, each in its own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2
from searchfoundation.v1 import common_pb2, rerank_pb2, rerank_rest_pb2_grpc

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.catalog.types import Modality
from services.core.content import Media
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, NotANumberError
from services.rerank.capability import build
from services.rerank.logic import Reranker
from services.rerank.types import RerankRequest
from tests.rerank.conftest import SETTINGS, Rig
from tests.rig import ALIAS, MINILM, detail, load_without_numbers, serving, settings, told
from tests.text_checkpoints import write_reranker_v2

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY = "How do plants make food?"
DOCUMENTS: list[Any] = [
    "The stock market fell on Monday.",
    {
        "text": "Photosynthesis turns light, water and carbon dioxide into sugar.",
        "id": 7,
        "tags": ["bio", None],
    },
    "Leaves are green because of chlorophyll.",
    "The stock market fell on Monday.",
]
TEXTS = [each if isinstance(each, str) else each["text"] for each in DOCUMENTS]


async def post(rig: Rig, body: Any) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return (await rig.rest.Rerank(httpbody_pb2.HttpBody(data=data))).data


async def rank(rig: Rig, **fields: Any) -> dict[str, Any]:
    return orjson.loads(await post(rig, {"model": MINILM, "query": QUERY, "documents": DOCUMENTS} | fields))


async def refused(rig: Rig, **fields: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rank(rig, **fields)
    return told(caught.value)


@pytest.mark.parametrize("padding", [0, 100_000])
async def test_whole_numbers_of_any_size_come_back_as_they_were_sent(rig: Rig, padding: int) -> None:
    ids = (b"12345678901234567890123", b"18446744073709551616", b"-9223372036854775809", b"7")
    documents = b",".join(b'{"text":"a","id":%s}' % id for id in ids)
    data = b'{"model":"%s","query":"a","documents":["b",%s]%s}' % (
        MINILM.encode(),
        documents,
        b" " * padding,
    )
    results = json.loads(await post(rig, data))["results"]
    shown = {each["index"]: each["document"] for each in results}
    assert shown[0] == "b" or shown[0] == {"text": "b"}
    assert [shown[place]["id"] for place in range(1, 5)] == [int(id) for id in ids]


def text(value: str) -> common_pb2.Content:
    return common_pb2.Content(text=value)


def request(
    *documents: str, query: str = QUERY, model: str = MINILM, **options: Any
) -> rerank_pb2.RerankRequest:
    return rerank_pb2.RerankRequest(
        model=model,
        query=text(query),
        documents=[text(document) for document in documents],
        options=rerank_pb2.RerankOptions(**options),
    )


async def test_the_body_on_the_wire(rig: Rig) -> None:
    body = await post(
        rig, {"model": f"jina-ai/{MINILM}", "query": QUERY, "documents": DOCUMENTS, "user": "me"}
    )
    assert list(orjson.loads(body)) == ["model", "object", "usage", "results"]
    start = b'{"model":"all-MiniLM-L6-v2","object":"list","usage":{"total_tokens":%d},"results":[{"index":1,'
    assert body.startswith(start % sum(rig.access.charged))
    first = orjson.loads(body)["results"][0]
    assert list(first) == ["index", "relevance_score", "document"]


async def test_the_best_comes_first_and_equal_ones_in_order(rig: Rig) -> None:
    results = (await rank(rig))["results"]
    assert [each["index"] for each in results] == [1, 2, 0, 3]
    scores = [each["relevance_score"] for each in results]
    assert scores == sorted(scores, reverse=True)
    assert scores[2] == scores[3]
    assert all(score == round(score, 8) for score in scores)


async def test_scores_are_the_cosines_of_the_model(rig: Rig) -> None:
    """The published vectors of two sentences, by the embedding door of the same engine."""
    from services.core.inference import EmbedOptions, finish

    vectors = finish(
        (await rig.engine.embedder(MINILM).embed([QUERY, *TEXTS], EmbedOptions(), Call("test"))).vectors
    )
    results = (await rank(rig))["results"]
    for each in results:
        assert each["relevance_score"] == pytest.approx(
            float(vectors[0] @ vectors[1 + each["index"]]), abs=1e-6
        )


async def test_ties_of_many_keep_their_order(rig: Rig) -> None:
    documents = ["the same", "another", "the same"] * 100
    results = (await rank(rig, documents=documents))["results"]
    same, another = ([i for i in range(300) if (i % 3 == 1) is odd] for odd in (False, True))
    assert [each["index"] for each in results] in (same + another, another + same)


async def test_documents_are_echoed_as_they_came(rig: Rig) -> None:
    results = (await rank(rig))["results"]
    assert [each["document"] for each in results] == [DOCUMENTS[each["index"]] for each in results]


async def test_the_echo_is_the_original_however_it_was_cut(rig: Rig) -> None:
    document = {"text": "stone " * 2000, "page": 1.5}
    body = await rank(rig, documents=[document], max_doc_length=8)
    assert body["results"][0]["document"] == document
    assert body["usage"] == {"total_tokens": 8 + 8}


async def test_without_documents(rig: Rig) -> None:
    results = (await rank(rig, return_documents=False))["results"]
    assert [list(each) for each in results] == [["index", "relevance_score"]] * 4


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (4, 4), (99, 4), (None, 4)])
async def test_top_n(rig: Rig, top_n: int | None, count: int) -> None:
    whole = (await rank(rig))["results"]
    body = await rank(rig, top_n=top_n)
    assert body["results"] == whole[:count]
    assert body["usage"]["total_tokens"] == rig.access.charged[0], "all documents are billed"


async def test_embeddings(rig: Rig) -> None:
    results = (await rank(rig, return_embeddings=True, top_n=2))["results"]
    assert list(results[0]) == ["index", "relevance_score", "document", "embedding"]
    for each in results:
        vector = np.array(each["embedding"], np.float32)
        assert vector.shape == (384,)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    typed = await rig.typed.Rerank(request(*TEXTS, top_n=2, return_embeddings=True))
    for ranked, each in zip(typed.results, results, strict=True):
        assert ranked.embedding.dimensions == 384
        assert ranked.embedding.values == pytest.approx(each["embedding"], abs=1e-6)


async def test_large_answers_are_written_in_slices(rig: Rig) -> None:
    documents = [f"document {n}" for n in range(400)]
    results = (await rank(rig, documents=documents, return_embeddings=True))["results"]
    assert sorted(each["index"] for each in results) == list(range(400))
    scores = [each["relevance_score"] for each in results]
    assert scores == sorted(scores, reverse=True)
    assert {len(each["embedding"]) for each in results} == {384}
    assert all(each["document"] == documents[each["index"]] for each in results)


@pytest.mark.parametrize("document", ["", " ", "a\0b", "\U0001f600", "x" * 300, "word " * 3000])
async def test_odd_documents(rig: Rig, document: str) -> None:
    results = (await rank(rig, documents=[document, "b"], query=document))["results"]
    assert {each["index"] for each in results} == {0, 1}
    assert results[0]["relevance_score"] == pytest.approx(1.0, abs=1e-6)
    assert results[0]["relevance_score"] <= 1.0


async def test_queries_as_objects(rig: Rig) -> None:
    assert (await rank(rig, query={"text": QUERY, "lang": "en"}))["results"] == (await rank(rig))["results"]


@pytest.mark.parametrize("truncation", [None, True])
async def test_long_texts_are_cut(rig: Rig, truncation: bool | None) -> None:
    body = await rank(rig, documents=["word " * 5000] * 2, truncation=truncation)
    assert body["usage"]["total_tokens"] == 2 * 512 + 8
    assert rig.access.charged == [2 * 512 + 8]


async def test_long_texts_that_may_not_be_cut(rig: Rig) -> None:
    for fields in ({"documents": ["a", "word " * 5000]}, {"query": "word " * 5000}):
        status, body = await refused(rig, truncation=False, **fields)
        assert (status, body["code"]) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert rig.access.charged == []


async def test_refusals_over_rest(rig: Rig) -> None:
    status, body = await refused(rig, top_n=0)
    field, message = f"body -> {MINILM} -> top_n", "Input should be greater than or equal to 1"
    assert status == 422
    assert body["detail"] == f"Validation error: '{field}' {message}"
    assert body["errors"] == [{"field": field, "message": message, "type": "greater_than_equal", "input": 0}]
    status, body = await refused(rig, model="jina-reranker-v3")
    assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
    assert body["detail"] == f"Model 'jina-reranker-v3' not found. Available models: {MINILM}, {ALIAS}."


async def test_the_limit_of_the_key_comes_first(rig: Rig) -> None:
    rig.access.refuse = ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)
    status, body = await refused(rig)
    assert (status, body["code"]) == (403, "AUTHZ_INSUFFICIENT_BALANCE")


async def test_typed_and_rest_agree(rig: Rig) -> None:
    rest = await rank(rig, documents=TEXTS)
    typed = await rig.typed.Rerank(request(*TEXTS))
    assert typed.model == rest["model"]
    assert [(each.index, each.relevance_score) for each in typed.results] == [
        (each["index"], each["relevance_score"]) for each in rest["results"]
    ]
    assert [each.document.text for each in typed.results] == [each["document"] for each in rest["results"]]
    assert typed.usage.total_tokens == typed.usage.prompt_tokens == rest["usage"]["total_tokens"]
    assert typed.timings.inference.ToNanoseconds() > 0
    assert not typed.results[0].HasField("embedding")


async def test_typed_options(rig: Rig) -> None:
    response = await rig.typed.Rerank(request(*TEXTS, top_n=1, return_documents=False, max_document_length=3))
    (only,) = response.results
    assert not only.HasField("document")
    assert response.usage.total_tokens == 8 + 4 * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Rerank(request("word " * 5000, truncate=False))
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INPUT_TOKEN_LIMIT_EXCEEDED"


async def test_refusals_over_grpc(rig: Rig) -> None:
    bad = request(*TEXTS, top_n=0, max_document_length=0)
    bad.documents.append(common_pb2.Content(image=common_pb2.Media(data=b"x")))
    bad.documents.append(common_pb2.Content())
    bad.query.Clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Rerank(bad)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert {violation.field for violation in violations} == {
        "query.text", "documents[4]", "documents[5].text", "options.top_n", "options.max_document_length"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "missing"), [("model", "model"), ("query", "query"), ("documents", "documents")]
)
async def test_fields_that_are_not_there(rig: Rig, field: str, missing: str) -> None:
    bad = request(*TEXTS)
    bad.ClearField(field)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Rerank(bad)
    (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == missing


async def test_strings_as_objects_where_clients_need_it() -> None:
    async with serving(build, settings(rerank_objects=True)) as up:
        stub = rerank_rest_pb2_grpc.RerankRestServiceStub(up.channel)
        body = orjson.dumps({"model": MINILM, "query": QUERY, "documents": DOCUMENTS})
        answer = await stub.Rerank(httpbody_pb2.HttpBody(data=body))  # type: ignore[misc]
    results = {each["index"]: each["document"] for each in orjson.loads(answer.data)["results"]}
    assert results == {0: {"text": TEXTS[0]}, 1: DOCUMENTS[1], 2: {"text": TEXTS[2]}, 3: {"text": TEXTS[3]}}


async def test_images_reach_no_scorer_of_texts(rig: Rig) -> None:
    for query, documents in (("q", ["a", Media(Modality.IMAGE, "x")]), (Media(Modality.IMAGE, "x"), ["a"])):
        with pytest.raises(ServiceError) as caught:
            await Reranker(rig.engine).rank(RerankRequest(MINILM, query, documents), Call("test"))
        assert caught.value.code is ErrorCode.INPUT_INVALID
        assert "image" in caught.value.detail


async def test_scores_that_are_not_numbers_are_no_answer() -> None:
    engine = await Engine.start(SETTINGS, Catalog.load(), load=load_without_numbers)
    with pytest.raises(NotANumberError):
        await Reranker(engine).rank(RerankRequest(MINILM, "q", ["a"]), Call("test"))
    await engine.stop(1.0)


async def test_a_cross_encoder_behind_the_same_doors(tmp_path: Path) -> None:
    """A tiny checkpoint in the published form: scores from 0 to 1, all documents billed, ties in order."""
    model = "jina-reranker-v2-base-multilingual"
    write_reranker_v2(tmp_path / model, max_position_embeddings=1026)
    async with serving(build, settings(models=(model,), model_dir=tmp_path)) as up:
        stub = rerank_rest_pb2_grpc.RerankRestServiceStub(up.channel)
        body = {
            "model": model,
            "query": "stone",
            "documents": ["river", {"text": "stone"}, "river"],
            "top_n": 3,
        }
        answer = await stub.Rerank(httpbody_pb2.HttpBody(data=orjson.dumps(body)))  # type: ignore[misc]
    found = orjson.loads(answer.data)
    scores = {each["index"]: each["relevance_score"] for each in found["results"]}
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    assert scores[0] == scores[2]
    assert [each["index"] for each in found["results"]] in ([1, 0, 2], [0, 2, 1])
    assert found["usage"]["total_tokens"] == sum(up.access.charged) > 0

"""Scoring documents by a query: the numbers, what is billed, and what others in the queue notice of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from services.core.call import Priority
from services.core.catalog import Catalog
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, ScoreOptions, Scores
from tests.inference.support import MINILM, Gate, call, embed, ids, running, text

QUERY = "which stone is under the bridge"
DOCUMENTS = ["copper and stone", "an island in winter", "the bridge stands on stone", ""]


async def score(
    engine: Engine, documents: Sequence[str] = DOCUMENTS, query: str = QUERY, **options: object
) -> Scores:
    return await engine.scorer(MINILM).score(query, documents, ScoreOptions(**options), call())  # type: ignore[arg-type]


async def test_scores_are_cosines() -> None:
    async with running() as engine:
        vectors = await embed(engine.embedder(MINILM), QUERY, *DOCUMENTS)
        scores = await score(engine)
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores.values, vectors[1:] @ vectors[0], atol=1e-6)
    assert int(np.argmax(scores.values)) == 2
    assert scores.usage.total == sum(len(ids(each)) for each in (QUERY, *DOCUMENTS))
    assert scores.embeddings is None


async def test_a_document_like_the_query_scores_one_at_most() -> None:
    async with running() as engine:
        scores = await score(engine, [QUERY] * 3)
    assert scores.values.tolist() == [pytest.approx(1.0, abs=1e-6)] * 3
    assert scores.values.max() <= 1.0


async def test_equal_documents_run_once_are_billed_each_and_score_the_same() -> None:
    gate = Gate()
    gate.open()
    documents = [text(40, seed) for seed in (1, 2, 1, 3, 1, 2)]
    async with running(gate, dtype="bfloat16") as engine:
        scores = await score(engine, documents)
    assert sorted(gate.items) == sorted(ids(each) for each in (QUERY, *set(documents)))
    assert scores.usage.total == sum(len(ids(each)) for each in (QUERY, *documents))
    values = scores.values
    assert values[0] == values[2] == values[4]
    assert values[1] == values[5]
    assert len(set(values.tolist())) == 3


async def test_embeddings_are_of_unit_length_and_in_order() -> None:
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    async with running() as engine:
        expected = await embed(engine.embedder(MINILM), *documents)
        scores = await score(engine, documents, return_embeddings=True)
    assert scores.embeddings is not None
    np.testing.assert_allclose(scores.embeddings, expected, atol=1e-6)


@pytest.mark.parametrize(("limit", "tokens"), [(None, 512), (511, 511), (600, 512), (9, 9), (1, 3)])
async def test_long_documents_are_cut(limit: int | None, tokens: int) -> None:
    async with running() as engine:
        scores = await score(engine, [text(700)], max_document_length=limit)
    assert scores.usage.total == tokens + len(ids(QUERY))


async def test_long_queries_are_cut_to_the_context() -> None:
    async with running() as engine:
        scores = await score(engine, ["stone"], text(700), max_document_length=5)
    assert scores.usage.total == 512 + len(ids("stone"))


@pytest.mark.parametrize(
    ("query", "documents", "limit", "told"),
    [
        ("a", ["b", text(700)], None, "512 tokens"),
        (text(700), ["b"], None, "512 tokens"),
        ("a", [text(20)], 10, "10 tokens"),
    ],
)
async def test_without_truncation_nothing_is_cut(
    query: str, documents: list[str], limit: int | None, told: str
) -> None:
    gate = Gate()
    gate.open()
    async with running(gate) as engine:
        with pytest.raises(ServiceError) as refused:
            await score(engine, documents, query, truncate=False, max_document_length=limit)
    assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
    assert told in refused.value.detail
    assert gate.seen == []


async def test_tokens_are_charged_once_before_anything_runs() -> None:
    gate, charged = Gate(), list[int]()
    gate.open()

    async def refuse(tokens: int) -> None:
        charged.append(tokens)
        raise ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)

    async with running(gate) as engine:
        with pytest.raises(ServiceError):
            await engine.scorer(MINILM).score("a", ["b", "b c"], ScoreOptions(), call(charge=refuse))
    assert charged == [3 + 3 + 4]
    assert gate.seen == []


async def test_query_and_documents_get_the_prompts_of_their_sides() -> None:
    gate = Gate()
    gate.open()
    spec = Catalog.load().require(MINILM)
    prompts = {"retrieval.query": "query: ", "retrieval.passage": "passage: "}
    asymmetric = replace(spec, tasks=tuple(prompts), prompts=prompts)
    async with running(gate, catalog=Catalog([asymmetric])) as engine:
        await score(engine, ["stone"], "light")
    assert sorted(gate.items) == sorted([ids("query: light"), ids("passage: stone")])


async def test_only_rerankers_score() -> None:
    spec = Catalog.load().require(MINILM)
    plain = replace(spec, id="plain", rerank=None, capabilities=spec.capabilities - {"rerank"})
    catalog = Catalog([spec, plain], {"house": MINILM})
    async with running(catalog=catalog, models=(MINILM, "plain")) as engine:
        assert engine.scorer("house").spec.id == "house"
        assert engine.scorer(MINILM).spec.id == MINILM
        with pytest.raises(ServiceError) as refused:
            engine.scorer("plain")
    assert refused.value.code is ErrorCode.INPUT_MODEL_NOT_FOUND
    assert f"Available models: {MINILM}, house." in refused.value.detail


@pytest.mark.parametrize("tenant", ["the same", "another"])
async def test_a_thousand_documents_let_others_pass(tenant: str) -> None:
    """A short text that comes while 1,000 documents wait is among the next batches, not behind them."""
    gate = Gate()
    async with running(gate, max_batch_tokens=64) as engine:
        documents = [text(24, seed) for seed in range(1000)]
        large = asyncio.create_task(
            engine.scorer(MINILM).score(QUERY, documents, ScoreOptions(), call(key_id="the same"))
        )
        await gate.reached()
        small = asyncio.create_task(embed(engine.embedder(MINILM), "a late guest", key_id=tenant))
        await asyncio.sleep(0.05)
        begun = len(gate.seen)
        gate.open()
        await asyncio.wait((small, large))
    position = next(n for n, batch in enumerate(gate.seen) if ids("a late guest") in batch)
    assert position - begun <= 4
    assert len(gate.seen) > 400
    assert len(large.result().values) == 1000


async def test_background_work_waits_for_interactive_scores() -> None:
    gate = Gate()
    async with running(gate, max_batch_tokens=64) as engine:
        background = [text(50, seed) for seed in range(100)]
        model = engine.embedder(MINILM)
        late = asyncio.create_task(embed(model, *background, priority=Priority.BATCH))
        await gate.reached()
        documents = [text(50, seed) for seed in range(1000, 1020)]
        soon = asyncio.create_task(score(engine, documents))
        await asyncio.sleep(0.05)
        begun = len(gate.seen)
        gate.open()
        await asyncio.wait((late, soon))
    wanted = {ids(document) for document in documents}
    places = [n for n, batch in enumerate(gate.seen) if wanted & set(batch)]
    assert max(places) - begun <= 30, "20 documents with the batch class' share in between"


async def test_a_cancelled_ranking_leaves_the_queue() -> None:
    gate = Gate()
    async with running(gate, max_batch_tokens=64) as engine:
        task = asyncio.create_task(score(engine, [text(50, seed) for seed in range(200)]))
        await gate.reached()
        task.cancel()
        await asyncio.wait((task,))
        gate.open()
        await embed(engine.embedder(MINILM), "next")
    assert len(gate.items) < 20

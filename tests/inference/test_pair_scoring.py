"""Scoring documents by cross-encoders over tiny checkpoints: through the engine, as a capability calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, ScoreOptions, Scores
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.registry import load_cross_encoder
from services.core.modeling.types import EncodeItem
from tests.inference.support import call, settings
from tests.text_checkpoints import write_model

V1, V2 = "jina-reranker-v1-tiny-en", "jina-reranker-v2-base-multilingual"
QUERY = "hello world"
DOCUMENTS = ["the quick brown fox", "", "hello", "a dog, a fox. hello world", "hello"]


@asynccontextmanager
async def serving(directory: Path, model: str, catalog: Catalog | None = None) -> AsyncIterator[Engine]:
    write_model(directory, model)
    chosen = settings(models=(model,), model_dir=directory)
    engine = await Engine.start(chosen, catalog or Catalog.load())
    try:
        yield engine
    finally:
        await engine.stop(10.0)


async def score(
    engine: Engine, model: str, documents: Sequence[str] = DOCUMENTS, query: str = QUERY, **options: object
) -> Scores:
    return await engine.scorer(model).score(query, documents, ScoreOptions(**options), call())  # type: ignore[arg-type]


def network(directory: Path, model: str) -> CrossEncoder:
    spec = Catalog.load().require(model)
    return load_cross_encoder(spec, directory / model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("model", [V1, V2])
async def test_each_document_has_the_score_of_its_pair(tmp_path: Path, model: str) -> None:
    async with serving(tmp_path, model) as engine:
        scores = await score(engine, model)
        assert [spec.id for spec in engine.served] == [model]
    alone = network(tmp_path, model)
    pairs = alone.tokenizer.pairs(alone.tokenizer.query(QUERY), DOCUMENTS)
    wanted = [alone.forward([EncodeItem(pair.windows[0])])[0] for pair in pairs]
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores.values, wanted, atol=1e-6)
    assert scores.values[2] == scores.values[4]
    assert scores.embeddings is None


async def test_the_best_window_of_a_long_document_counts(tmp_path: Path) -> None:
    document = " ".join(["the quick fox"] * 400 + ["hello world dog"] * 400 + ["a b"] * 300)
    async with serving(tmp_path, V2) as engine:
        scores = await score(engine, V2, ["hello", document, "fox"], truncate=False)
    alone = network(tmp_path, V2)
    (pair,) = alone.tokenizer.pairs(alone.tokenizer.query(QUERY), [document])
    assert len(pair.windows) > 3
    windows = alone.forward([EncodeItem(window) for window in pair.windows])
    assert scores.values[1] == pytest.approx(max(windows), abs=1e-6)
    assert scores.usage.total == 4 + 3 + 3 + 3002


async def test_tokens_are_those_read_and_charged_once_before_anything_runs(tmp_path: Path) -> None:
    charged: list[int] = []

    async def note(tokens: int) -> None:
        charged.append(tokens)

    async with serving(tmp_path, V2) as engine:
        scorer = engine.scorer(V2)
        scores = await scorer.score(QUERY, ["hello", "hello", "a fox"], ScoreOptions(), call(charge=note))
    assert scores.usage.total == 4 + 3 + 3 + 4
    assert charged == [scores.usage.total]


@pytest.mark.parametrize(("limit", "tokens"), [(None, 602), (600, 600), (9, 9), (1, 3)])
async def test_a_document_is_cut_where_the_caller_says(
    tmp_path: Path, limit: int | None, tokens: int
) -> None:
    async with serving(tmp_path, V2) as engine:
        scores = await score(engine, V2, [" ".join(["hello"] * 600)], max_document_length=limit)
    assert scores.usage.total == tokens + 4


@pytest.mark.parametrize(
    ("model", "query", "document", "limit", "told"),
    [
        (V2, " ".join(["hello"] * 600), "a", None, "512 tokens"),
        (V2, "a", " ".join(["hello"] * 20), 10, "10 tokens"),
        (V1, "hello " * 3000, "hello " * 3000, None, "8192 tokens"),
    ],
)
async def test_without_truncation_nothing_is_cut(
    tmp_path: Path, model: str, query: str, document: str, limit: int | None, told: str
) -> None:
    async with serving(tmp_path, model) as engine:
        with pytest.raises(ServiceError) as refused:
            await score(engine, model, [document], query, truncate=False, max_document_length=limit)
    assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
    assert told in refused.value.detail


async def test_a_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, V2) as engine:
        for query, document in (("\ud800", "a"), ("a", "\ud800")):
            with pytest.raises(ServiceError) as refused:
                await score(engine, V2, [document], query)
            assert refused.value.code is ErrorCode.INPUT_INVALID


async def test_a_reranker_does_not_embed_and_may_have_an_alias(tmp_path: Path) -> None:
    catalog = Catalog(Catalog.load().models.values(), {"judge": V2})
    async with serving(tmp_path, V2, catalog) as engine:
        aliased = await score(engine, "judge")
        plain = await score(engine, V2)
        assert aliased.values.tolist() == plain.values.tolist()
        with pytest.raises(ServiceError) as refused:
            engine.embedder(V2)
    assert refused.value.code is ErrorCode.INPUT_MODEL_NOT_FOUND

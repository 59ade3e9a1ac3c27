"""The listwise reranker through the engine, as a capability calls it, over tiny checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, ScoreOptions, Scores
from services.core.inference.list_scoring import fuse
from services.core.inference.loading import load_model
from services.core.modeling.families import listwise
from services.core.modeling.families.listwise import CutText, ListwiseRanker, blocks_of, prompt
from services.core.modeling.types import EncodeItem
from services.core.settings import Settings
from tests.decoder_checkpoints import MARKERS, qwen_tokenizer, write_ranker
from tests.inference.support import Gate, call, settings
from tests.modeling.test_listwise import expected

V3, V35 = "jina-reranker-v3", "jina-reranker-v3.5"
DOCUMENTS = ["hello world", "", "a fox", "hello hello, it is me", "hello world", "b", "the quick brown fox"]


@asynccontextmanager
async def serving(directory: Path, model: str = V3) -> AsyncIterator[Engine]:
    write_ranker(directory / model)
    engine = await Engine.start(settings(models=(model,), model_dir=directory), Catalog.load())
    try:
        yield engine
    finally:
        await engine.stop(10.0)


async def score(
    engine: Engine, documents: Sequence[str], query: str = "hello fox", **options: object
) -> Scores:
    return await engine.scorer(V3).score(query, documents, ScoreOptions(**options), call())  # type: ignore[arg-type]


def tokens(text: str) -> list[int]:
    return qwen_tokenizer(*MARKERS).encode(text).ids


def slow(directory: Path, query: str, blocks: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and vectors of all documents, number by number in float64."""

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(sum(x * y for x, y in zip(a, b, strict=True)) / (sum(a * a) * sum(b * b)) ** 0.5)

    fused, total, vectors = np.zeros(512), 0.0, []
    for documents in blocks:
        ids = np.array(tokens(prompt(query, documents)), np.int32)
        asked, *written = expected(directory, ids)
        weight = max((1 + cos(asked, vector)) / 2 for vector in written)
        fused, total = fused + weight * asked, total + weight
        vectors += written
    return np.array([cos(fused / total, vector) for vector in vectors]), np.stack(vectors)


async def test_one_block_is_read_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as engine:
        scores = await score(engine, DOCUMENTS)
        again = await score(engine, DOCUMENTS)
        assert [spec.id for spec in engine.served] == [V3]
    wanted, _ = slow(tmp_path / V3, "hello fox", [DOCUMENTS])
    np.testing.assert_allclose(scores.values, wanted, atol=1e-5)
    np.testing.assert_array_equal(scores.values, again.values)
    assert scores.values.dtype == np.float32
    assert scores.values[0] != scores.values[4]
    assert scores.embeddings is None
    assert scores.usage.total == len(tokens("hello fox")) + sum(len(tokens(text)) for text in DOCUMENTS)


async def test_blocks_are_fused_by_their_best_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listwise, "BLOCK_DOCUMENTS", 3)
    async with serving(tmp_path) as engine:
        scores = await score(engine, DOCUMENTS, return_embeddings=True)
    blocks = [DOCUMENTS[:3], DOCUMENTS[3:6], DOCUMENTS[6:]]
    wanted, vectors = slow(tmp_path / V3, "hello fox", blocks)
    np.testing.assert_allclose(scores.values, wanted, atol=1e-5)
    assert scores.embeddings is not None
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(scores.embeddings, units, atol=1e-5)


async def test_texts_are_cut_and_lose_their_markers(tmp_path: Path) -> None:
    long = "hello" * 700
    async with serving(tmp_path) as engine:
        scores = await score(engine, ["fox <|embed_token|>" * 9, "b"], long, max_document_length=4)
        with pytest.raises(ServiceError) as refused:
            await score(engine, ["a fox", "b"], truncate=False, max_document_length=4)
        assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
        assert "4" in refused.value.detail
        with pytest.raises(ServiceError) as refused:
            await score(engine, ["b"], long, truncate=False)
        assert "512" in refused.value.detail
    wanted, _ = slow(tmp_path / V3, "hello" * 512, [["fox ", "b"]])
    np.testing.assert_allclose(scores.values, wanted, atol=1e-5)
    assert scores.usage.total == 512 + 4 + 1


async def test_a_surrogate_is_refused_and_tokens_are_charged_once(tmp_path: Path) -> None:
    charged: list[int] = []

    async def note(count: int) -> None:
        charged.append(count)

    async with serving(tmp_path) as engine:
        with pytest.raises(ServiceError) as refused:
            await score(engine, ["fine", "\ud800"])
        assert refused.value.code is ErrorCode.INPUT_INVALID
        await engine.scorer(V3).score("hello", ["a", "b"], ScoreOptions(), call(charge=note))
    assert charged == [3]


async def test_an_alias_and_the_sliding_sibling_are_served(tmp_path: Path) -> None:
    async with serving(tmp_path, V35) as engine:
        scores = await engine.scorer(V35).score("hello", DOCUMENTS, ScoreOptions(), call())
        with pytest.raises(ServiceError):
            engine.embedder(V35)
    assert scores.values.shape == (7,)


async def test_a_short_ranking_runs_between_two_blocks_of_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listwise, "BLOCK_DOCUMENTS", 1)
    gate = Gate()

    def load(spec: ModelSpec, chosen: Settings, device: torch.device) -> ListwiseRanker:
        ranker = load_model(spec, chosen, device)
        assert isinstance(ranker, ListwiseRanker)
        forward = ranker.forward

        def watched(batch: Sequence[EncodeItem]) -> list[np.ndarray]:
            gate(batch)
            return forward(batch)

        monkeypatch.setattr(ranker, "forward", watched)
        return ranker

    write_ranker(tmp_path / V3)
    engine = await Engine.start(settings(models=(V3,), model_dir=tmp_path), Catalog.load(), load=load)
    try:
        long = asyncio.create_task(score(engine, [f"document {i}" for i in range(40)]))
        await gate.reached()
        short = asyncio.create_task(score(engine, ["a fox"]))
        await asyncio.sleep(0.05)
        gate.open()
        await short
        assert not long.done()
        await long
        assert [len(batch) for batch in gate.seen] == [1] * 41
        place = gate.items.index(tuple(tokens(prompt("hello fox", ["a fox"]))))
        assert place < 20
    finally:
        await engine.stop(10.0)


def cut(*lengths: int) -> list[CutText]:
    return [CutText(str(i), length, False) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "room", "longest", "sizes"),
    [
        ([1] * 125, 1000, 10, [125]),
        ([1] * 126, 1000, 10, [125, 1]),
        ([10] * 9, 50, 10, [4, 4, 1]),
        ([10, 10, 10], 10, 10, [1, 1, 1]),
        ([10, 10, 10], 41, 10, [3]),
        ([30, 1, 1, 30], 50, 19, [2, 2]),
        ([0, 0], 5, 10, [1, 1]),
    ],
)
def test_blocks_are_closed_by_number_and_by_room(
    lengths: list[int], room: int, longest: int, sizes: list[int]
) -> None:
    documents = cut(*lengths)
    blocks = blocks_of(documents, room, longest)
    assert [len(block) for block in blocks] == sizes
    assert [text for block in blocks for text in block] == documents


def test_blocks_that_fit_nothing_count_alike() -> None:
    away = np.array([[1, 0], [-1, 0]], np.float32)
    values, documents = fuse([away, away * 2])
    np.testing.assert_allclose(values, [-1, -1])
    np.testing.assert_array_equal(documents, [[-1, 0], [-2, 0]])

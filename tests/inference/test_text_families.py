"""Tasks, late chunking, multi-vectors and sparse vectors through the engine, over tiny checkpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.catalog.types import InputType
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, Engine, Inputs, ScoreOptions, finish
from services.core.inference.late_chunking import join_chunks
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, SparseVector, TextEncoder, Tokens
from tests.inference.support import call, settings
from tests.text_checkpoints import write_model

V3, V1_COLBERT, V2_COLBERT, ELSER = "jina-embeddings-v3", "jina-colbert-v1-en", "jina-colbert-v2", "elser-v2"
TEXTS = ["the quick brown fox", "hello world", "a dog, a fox."]


@asynccontextmanager
async def serving(directory: Path, model: str, longest: int = 0) -> AsyncIterator[Engine]:
    write_model(directory, model)
    spec = Catalog.load().require(model)
    catalog = Catalog([replace(spec, sequence_length=longest) if longest else spec])
    engine = await Engine.start(settings(models=(model,), model_dir=directory), catalog)
    try:
        yield engine
    finally:
        await engine.stop(10.0)


def network(directory: Path, model: str) -> TextEncoder:
    spec = Catalog.load().require(model)
    return load_text_encoder(spec, directory / model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("task", [None, "retrieval.query", "retrieval.passage", "text-matching"])
async def test_a_task_chooses_adapter_and_prompt(tmp_path: Path, task: str | None) -> None:
    async with serving(tmp_path, V3) as engine:
        model = engine.embedder(V3)
        found = await model.embed(TEXTS, EmbedOptions(task), call())
        prompt = model.spec.prompt(task)
    alone = network(tmp_path, V3)
    tokens = alone.tokenizer.encode_batch([prompt + text for text in TEXTS])
    wanted = alone.forward([EncodeItem(each.ids, task) for each in tokens])
    np.testing.assert_allclose(found.vectors, np.stack(wanted), atol=1e-5)
    assert found.token_counts == [len(each.ids) for each in tokens]


@pytest.mark.parametrize("task", [None, "retrieval.passage"])
async def test_late_chunks_are_parts_of_one_text(tmp_path: Path, task: str | None) -> None:
    async with serving(tmp_path, V3) as engine:
        model = engine.embedder(V3)
        plain = await model.embed(TEXTS, EmbedOptions(task), call())
        late = await model.embed(TEXTS, EmbedOptions(task, late_chunking=True), call())
        prompt = model.spec.prompt(task)
    alone = network(tmp_path, V3)
    (whole,) = alone.tokenizer.encode_batch([prompt + " ".join(TEXTS)])
    bare = [len(each.ids) - 2 for each in alone.tokenizer.encode_batch(TEXTS)]
    first = len(alone.tokenizer.encode_batch([prompt + TEXTS[0]])[0].ids) - 1
    spans = ((0, first), (first, first + bare[1]), (first + bare[1], len(whole.ids)))
    (wanted,) = alone.forward([EncodeItem(whole.ids, task, spans)])
    np.testing.assert_allclose(late.vectors, wanted, atol=1e-5)
    assert np.abs(late.vectors - plain.vectors).max() > 0.01
    assert sum(late.token_counts) == len(whole.ids)


async def test_late_chunking_reads_no_further_than_its_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tokenize = TextProcessor.tokenize

    def counted(self: TextProcessor, texts: Sequence[str], *rest: Any) -> Any:
        read.extend(texts)
        return tokenize(self, texts, *rest)

    monkeypatch.setattr(TextProcessor, "tokenize", counted)
    async with serving(tmp_path, V3, longest=82) as engine:
        model = engine.embedder(V3)
        for truncate in (False, True):
            options = EmbedOptions(late_chunking=True, truncate=truncate)
            with pytest.raises(ServiceError) as refused:
                await model.embed(["hello " * 1000] * 2000, options, call())
            assert "none are left for input 1" in refused.value.detail
    assert len(read) < 50


async def test_late_chunking_shares_one_context(tmp_path: Path) -> None:
    charged: list[int] = []

    async def note(tokens: int) -> None:
        charged.append(tokens)

    long = " ".join(["hello"] * 50)
    options = EmbedOptions(late_chunking=True)
    async with serving(tmp_path, V3, longest=82) as engine:
        model = engine.embedder(V3)
        with pytest.raises(ServiceError) as refused:
            await model.embed([long, long], options, call(charge=note))
        assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
        assert charged == []
        with pytest.raises(ServiceError) as refused:
            await model.embed([long, long, "hello"], EmbedOptions(truncate=True, late_chunking=True), call())
        assert refused.value.code is ErrorCode.INPUT_INVALID
        assert "input 2" in refused.value.detail
        with pytest.raises(ServiceError) as refused:
            await model.embed(["hello", "", "hello"], options, call())
        assert "Input 1 has no tokens" in refused.value.detail
        cut = EmbedOptions(truncate=True, late_chunking=True)
        found = await model.embed([long, long], cut, call(charge=note))
    assert found.token_counts == [51, 30]
    assert charged == [82]


def tokens(*ids: int, truncated: bool = False) -> Tokens:
    array = np.array([0, *ids, 2], np.int32)
    return Tokens(array, len(array), truncated)


def test_specials_belong_to_the_first_and_the_last_chunk() -> None:
    chunks = join_chunks([tokens(5, 6), tokens(7), tokens(8, 9)], 1, 1, 10)
    assert chunks.ids.tolist() == [0, 5, 6, 7, 8, 9, 2]
    assert chunks.spans == ((0, 3), (3, 4), (4, 7))
    assert not chunks.truncated
    cut = join_chunks([tokens(5, 6), tokens(7), tokens(8, 9)], 1, 1, 6)
    assert cut.ids.tolist() == [0, 5, 6, 7, 8, 2]
    assert cut.spans == ((0, 3), (3, 4), (4, 5))
    assert cut.truncated
    alone = join_chunks([tokens(5, 6, truncated=True)], 1, 1, 4)
    assert (alone.spans, alone.truncated) == (((0, 3),), True)


@pytest.mark.parametrize("model", [V1_COLBERT, V2_COLBERT])
async def test_a_query_always_has_its_vectors_and_is_billed_by_its_words(tmp_path: Path, model: str) -> None:
    texts = ["hello", " ".join(["hello"] * 90)]
    async with serving(tmp_path, model) as engine:
        colbert = engine.embedder(model)
        queries = await colbert.encode([Inputs(texts, role=InputType.QUERY)], True, call())
        documents = await colbert.encode([Inputs(texts)], True, call())
    assert [each.shape for each in queries.results] == [(32, 128), (32, 128)]
    assert queries.token_counts == [4, 32]
    assert [each.shape for each in documents.results] == [(4, 128), (93, 128)]
    assert documents.token_counts == [4, 93]
    alone = network(tmp_path, model)
    asked = alone.query_tokenizer.encode_batch(texts)
    for found, wanted in zip(queries.results, alone.forward([EncodeItem(t.ids) for t in asked]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("model", [V1_COLBERT, V2_COLBERT])
async def test_late_interaction_sums_the_best_of_each_token(tmp_path: Path, model: str) -> None:
    documents = ["hello world", "the fox", "", "hello world", "quick, brown. dog"]
    async with serving(tmp_path, model) as engine:
        scores = await engine.scorer(model).score("hello fox", documents, ScoreOptions(), call())
    alone = network(tmp_path, model)
    (asked,) = alone.query_tokenizer.encode_batch(["hello fox"])
    written = alone.tokenizer.encode_batch(documents)
    query = finish(alone.forward([EncodeItem(asked.ids)])[0])  # type: ignore[arg-type]
    wanted = []
    for each in written:
        vectors = finish(alone.forward([EncodeItem(each.ids)])[0])  # type: ignore[arg-type]
        wanted.append(sum(max(float(a @ b) for b in vectors) for a in query))
    np.testing.assert_allclose(scores.values, wanted, atol=1e-4)
    assert scores.values[0] == scores.values[3]
    assert scores.usage.total == asked.length + sum(len(each.ids) for each in written)


async def test_a_sparse_model_names_vocabulary_entries(tmp_path: Path) -> None:
    async with serving(tmp_path, ELSER) as engine:
        model = engine.embedder(ELSER)
        found = await model.encode([Inputs(["hello world", "hello " * 700])], True, call())
        first = found.results[0]
        assert isinstance(first, SparseVector)
        names = found.token_names(first.indices.tolist())
    assert found.token_counts == [4, 512]
    assert len(set(names)) == len(first.values) > 0
    assert set(names) <= set(network(tmp_path, ELSER).tokenizer.names(range(19)))

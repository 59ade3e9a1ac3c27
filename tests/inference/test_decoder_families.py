"""jina-embeddings-v5-text and jina-code-embeddings through the engine, over tiny checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, Engine, finish
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.decoder_checkpoints import write_served
from tests.inference.support import call, settings

NANO, SMALL, CODE = (
    "jina-embeddings-v5-text-nano",
    "jina-embeddings-v5-text-small",
    "jina-code-embeddings-0.5b",
)
MODELS = (NANO, SMALL, CODE, "jina-code-embeddings-1.5b")
TEXTS = ["def hello(world):", "", "who is it? " * 30]


@asynccontextmanager
async def serving(directory: Path, model: str) -> AsyncIterator[Engine]:
    write_served(directory, model)
    engine = await Engine.start(settings(models=(model,), model_dir=directory), Catalog.load())
    try:
        yield engine
    finally:
        await engine.stop(10.0)


def network(directory: Path, model: str) -> TextEncoder:
    spec = Catalog.load().require(model)
    return load_text_encoder(spec, directory / model, device=torch.device("cpu"), dtype=torch.float32)


def wanted(alone: TextEncoder, prompt: str, adapter: str | None) -> tuple[np.ndarray, list[int]]:
    tokens = alone.tokenizer.encode_batch([prompt + text for text in TEXTS])
    vectors = [alone.forward([EncodeItem(each.ids, adapter)])[0] for each in tokens]
    return np.stack(vectors), [len(each.ids) for each in tokens]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "task", "prompt", "adapter"),
    [
        (NANO, None, "Document: ", "text-matching"),
        (NANO, "retrieval.query", "Query: ", "retrieval"),
        (SMALL, "retrieval.passage", "Document: ", "retrieval"),
        (SMALL, "clustering", "Document: ", "clustering"),
        (SMALL, "classification", "Document: ", "classification"),
        (CODE, None, "Find the most relevant code snippet given the following query:\n", None),
        (CODE, "code2nl.passage", "Candidate comment:\n", None),
    ],
)
async def test_a_task_chooses_prompt_and_adapter(
    tmp_path: Path, model: str, task: str | None, prompt: str, adapter: str | None
) -> None:
    async with serving(tmp_path, model) as engine:
        found = await engine.embedder(model).embed(TEXTS, EmbedOptions(task), call())
    vectors, counts = wanted(network(tmp_path, model), prompt, adapter)
    np.testing.assert_allclose(found.vectors, vectors, atol=1e-4)
    assert found.token_counts == counts


@pytest.mark.parametrize("model", [NANO, SMALL])
async def test_calls_with_different_tasks_share_the_device(tmp_path: Path, model: str) -> None:
    spec = Catalog.load().require(model)
    async with serving(tmp_path, model) as engine:
        embedder = engine.embedder(model)
        calls = [embedder.embed(TEXTS, EmbedOptions(task), call()) for task in (*spec.tasks, None) * 3]
        found = await asyncio.gather(*calls)
    alone = network(tmp_path, model)
    for task, each in zip((*spec.tasks, None) * 3, found, strict=True):
        vectors, _ = wanted(alone, spec.prompt(task), spec.adapter(task))
        np.testing.assert_allclose(each.vectors, vectors, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
async def test_a_vector_may_be_shortened(tmp_path: Path, model: str) -> None:
    async with serving(tmp_path, model) as engine:
        spec: ModelSpec = engine.embedder(model).spec
        found = await engine.embedder(model).embed(["hello"], EmbedOptions(), call())
    assert found.vectors.shape == (1, spec.dimensions)
    for width in spec.trained_dimensions:
        (short,) = finish(found.vectors, dimensions=width)
        assert short.shape == (width,)
        assert np.linalg.norm(short) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("model", [NANO, SMALL])
async def test_a_text_is_cut_before_its_last_token_is_pooled(tmp_path: Path, model: str) -> None:
    long = "hello " * 40000
    async with serving(tmp_path, model) as engine:
        embedder = engine.embedder(model)
        with pytest.raises(ServiceError) as refused:
            await embedder.embed([long], EmbedOptions(), call())
        assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
        if model == NANO:
            found = await embedder.embed([long], EmbedOptions(truncate=True), call())
            assert found.token_counts == [8192]
            (tokens,) = network(tmp_path, model).tokenizer.encode_batch(["Document: " + long], "", 8192)
            (vector,) = network(tmp_path, model).forward([EncodeItem(tokens.ids, "text-matching")])
            np.testing.assert_allclose(found.vectors[0], vector, atol=1e-4)
            (end,) = network(tmp_path, model).tokenizer.names([tokens.ids[-1]])
            assert end == "<|endoftext|>"

"""Vectors do not depend on company, order or number format."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine, finish
from tests.inference.support import MINILM, call, embed, running, settings, text

HELLO = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]


async def test_a_known_text_has_its_known_vector() -> None:
    engine = await Engine.start(settings(), Catalog.load())
    try:
        (vector,) = await embed(engine.embedder(MINILM), "hello world")
    finally:
        await engine.stop(1.0)
    np.testing.assert_allclose(vector[:5], HELLO, atol=1e-4)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


async def test_two_thousand_concurrent_texts_have_the_vectors_of_lonely_ones() -> None:
    random = np.random.default_rng(7)
    lengths = random.permutation([*random.geometric(1 / 8, 196), 60, 120, 180, 250])
    texts = [text(int(n), seed) for seed, n in enumerate(lengths)]
    async with running() as engine:
        model = engine.embedder(MINILM)
        alone = np.concatenate([await embed(model, each) for each in texts])
        picked = random.integers(0, len(texts), 2000)
        together = await asyncio.gather(*(embed(model, texts[i]) for i in picked))
        in_one_call = await embed(model, *(texts[i] for i in picked[:500]))
    assert _worst_cosine(np.concatenate(together), alone[picked]) >= 0.9999
    assert _worst_cosine(in_one_call, alone[picked[:500]]) >= 0.9999
    async with running(dtype="bfloat16") as engine:
        model = engine.embedder(MINILM)
        half = await asyncio.gather(*(embed(model, texts[i]) for i in picked))
    assert _worst_cosine(np.concatenate(half), alone[picked]) >= 0.9995


def _worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", a, b).min())


async def test_counts_and_timings() -> None:
    async with running() as engine:
        model = engine.embedder(MINILM)
        one = call()
        result = await model.embed(["hello world", "", " \t\n", "a\x00b"], EmbedOptions(), one)
        none = await model.embed([], EmbedOptions(), call())
    assert result.vectors.shape == (4, 384)
    assert result.vectors.dtype == np.float32
    assert result.token_counts == [4, 2, 2, 3]
    assert one.timings.tokenize > 0
    assert one.timings.inference > 0
    assert none.vectors.shape == (0, 384)


class TestFinish:
    def test_cuts_before_it_normalises(self) -> None:
        vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 5.0]], np.float32)
        np.testing.assert_allclose(finish(vectors, dimensions=2), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
        np.testing.assert_array_equal(finish(vectors, dimensions=2, normalized=False), vectors[:, :2])

    def test_leaves_its_input_alone(self) -> None:
        vectors = np.array([[3.0, 4.0]], np.float32)
        assert finish(vectors).dtype == np.float32
        np.testing.assert_array_equal(vectors, [[3.0, 4.0]])

"""The tokenise stage under texts of every size and kind."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions
from tests.inference.support import MINILM, Gate, call, embed, running, text

HUGE = text(160_000)


async def test_a_million_characters_are_refused_or_cut() -> None:
    assert len(HUGE) >= 1_000_000
    gate = Gate()
    gate.open()
    async with running(gate, dtype="auto") as engine:
        model = engine.embedder(MINILM)
        with pytest.raises(ServiceError) as refused:
            await embed(model, "short", HUGE)
        assert gate.seen == []
        cut = await model.embed([HUGE], EmbedOptions(truncate=True), call())
        head = await model.embed([HUGE[:8000]], EmbedOptions(truncate=True), call())
    assert refused.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
    assert "512" in refused.value.detail
    assert cut.token_counts == head.token_counts == [512]
    np.testing.assert_allclose(cut.vectors, head.vectors, atol=1e-2)


async def test_huge_texts_do_not_hold_up_short_ones() -> None:
    async with running(dtype="auto") as engine:
        model = engine.embedder(MINILM)
        order: list[str] = []

        async def note(name: str, *texts: str) -> None:
            await embed(model, *texts, truncate=True)
            order.append(name)

        huge = [asyncio.ensure_future(note("huge", *[HUGE] * 20)) for _ in range(2)]
        await asyncio.sleep(0)
        await note("short", "short")
        await asyncio.gather(*huge)
    assert order == ["short", "huge", "huge"]


async def test_giant_words_are_served_beside_texts_of_ordinary_length() -> None:
    async with running(dtype="auto") as engine:
        model = engine.embedder(MINILM)
        giants = [asyncio.ensure_future(embed(model, "a" * 1_500_000, truncate=True)) for _ in range(3)]
        await asyncio.sleep(0)
        await embed(model, text(1000), truncate=True)
        vectors = await asyncio.gather(*giants)
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-2)


async def test_many_texts_keep_their_order_over_chunks() -> None:
    texts = [f"{n} {text(n % 40)}" for n in range(2048)]
    async with running(dtype="auto") as engine:
        model = engine.embedder(MINILM)
        counts = (await model.embed(texts, EmbedOptions(), call())).token_counts
        alone = [
            (await model.embed([texts[n]], EmbedOptions(), call())).token_counts[0] for n in (0, 700, 2047)
        ]
    assert [counts[n] for n in (0, 700, 2047)] == alone


@pytest.mark.parametrize("others", [0, 3000], ids=["inline", "in threads"])
async def test_lone_surrogates_are_refused(others: int) -> None:
    async with running(dtype="auto") as engine:
        model = engine.embedder(MINILM)
        with pytest.raises(ServiceError) as refused:
            await embed(model, *["another text that is fine"] * others, "a\ud800b")
        assert refused.value.code is ErrorCode.INPUT_INVALID
        await embed(model, "a b")

"""Starting, finding models, stopping."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from services.core.catalog import Catalog
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, EngineStartError
from tests.inference.support import MINILM, Gate, embed, running, settings


async def test_knows_models_by_their_ids_and_aliases() -> None:
    """Other names are the catalogue's to resolve, before a call comes here."""
    catalog = Catalog.load(aliases={"house-model": MINILM})
    async with running(catalog=catalog) as engine:
        assert [spec.id for spec in engine.served] == [MINILM, "house-model"]
        assert engine.embedder(catalog.require(f"jina-ai/{MINILM}").id).spec.id == MINILM
        alias = engine.embedder("house-model")
        assert alias.spec.id == "house-model"
        np.testing.assert_array_equal(await embed(alias, "x"), await embed(engine.embedder(MINILM), "x"))
        with pytest.raises(ServiceError) as unknown:
            engine.embedder("jina-embeddings-v3")
    assert unknown.value.code is ErrorCode.INPUT_MODEL_NOT_FOUND
    assert unknown.value.detail == (
        f"Model 'jina-embeddings-v3' not found. Available models: {MINILM}, house-model."
    )


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"models": ("no-such-model",)}, "Unknown model 'no-such-model'"),
        ({"models": ("jina-embeddings-v2-base-en",)}, "no weights of jina-embeddings-v2-base-en"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "toaster"}, "'toaster' is no device"),
        ({"cpu_instructions": "sse9"}, "'sse9' is no instruction set; use auto or one of "),
    ],
)
async def test_says_why_it_cannot_start(
    values: dict[str, object], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EngineStartError, match=complaint):
        await Engine.start(settings(model_dir=tmp_path, **values), Catalog.load())


async def test_stopping_finishes_what_is_inside_and_takes_nothing_more() -> None:
    gate = Gate()
    async with running(gate) as engine:
        model = engine.embedder(MINILM)
        inside = [asyncio.ensure_future(embed(model, *[f"text {i}"] * 30)) for i in range(20)]
        await gate.reached()
        stopping = asyncio.ensure_future(engine.stop(30.0))
        await asyncio.sleep(0)
        assert not engine.healthy
        with pytest.raises(ServiceError) as refused:
            await embed(model, "late")
        gate.open()
        results = await asyncio.gather(*inside)
        await stopping
    assert [len(each) for each in results] == [30] * 20
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert refused.value.retry_after


async def test_stopping_fails_what_the_grace_does_not_suffice_for() -> None:
    gate = Gate()
    async with running(gate) as engine:
        model = engine.embedder(MINILM)
        inside = [asyncio.ensure_future(embed(model, *[f"text {i}"] * 60)) for i in range(20)]
        await gate.reached()
        stopping = asyncio.ensure_future(engine.stop(0.01))
        while engine._runtime._scheduler.queued_tokens:  # noqa: ASYNC110 - a thread lets go of them
            await asyncio.sleep(0.01)
        gate.open()
        await stopping
        results = await asyncio.wait_for(asyncio.gather(*inside, return_exceptions=True), 100)
    failed = [each for each in results if isinstance(each, ServiceError)]
    assert len(failed) >= 15
    assert {each.code for each in failed} == {ErrorCode.SERVICE_UNAVAILABLE}


async def test_stopping_waits_for_no_batch_that_hangs() -> None:
    gate = Gate()
    async with running(gate) as engine:
        hanging = asyncio.ensure_future(embed(engine.embedder(MINILM), "x"))
        await gate.reached()
        await asyncio.wait_for(engine.stop(0.0), 100)
        assert not hanging.done()
        gate.open()
        assert len(await hanging) == 1


async def test_counts_batches_and_loading() -> None:
    def value(name: str) -> float:
        return REGISTRY.get_sample_value(f"searchfoundation_{name}", {"model": MINILM}) or 0.0

    before = value("batch_items_sum"), value("batch_tokens_sum"), value("batch_seconds_count")
    async with running() as engine:
        await embed(engine.embedder(MINILM), "hello world", "hello")
    assert value("batch_items_sum") == before[0] + 2
    assert value("batch_tokens_sum") == before[1] + 7
    assert value("batch_seconds_count") > before[2]
    assert value("model_load_seconds") > 0

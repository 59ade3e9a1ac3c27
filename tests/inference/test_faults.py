"""What breaks stays with the call that broke it, until nothing works any more, which is said aloud."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from services.core.errors import ErrorCode, ServiceError
from services.core.inference import InferenceError
from services.core.modeling.types import EncodeItem
from tests.inference.support import MINILM, Gate, embed, ids, running, text

POISON = "copper bridge"
TEXTS = [text(6 + n % 3, seed=n) for n in range(40)]


def tokens(batch: Sequence[EncodeItem]) -> int:
    return sum(len(item.token_ids) for item in batch)


def holds(batch: Sequence[EncodeItem], wanted: str) -> bool:
    return any(tuple(item.token_ids.tolist()) == ids(wanted) for item in batch)


async def test_a_poison_text_fails_alone() -> None:
    gate = Gate()

    def hook(batch: Sequence[EncodeItem]) -> None:
        gate(batch)
        if holds(batch, POISON):
            raise ValueError("poison")

    async with running() as engine:
        expected = await embed(engine.embedder(MINILM), *TEXTS)
    async with running(hook) as engine:
        model = engine.embedder(MINILM)
        calls = [asyncio.ensure_future(embed(model, each)) for each in [*TEXTS[:20], POISON, *TEXTS[20:]]]
        mixed = asyncio.ensure_future(embed(model, TEXTS[0], POISON, *TEXTS[1:]))
        await gate.reached()
        gate.open()
        results = await asyncio.gather(*calls, mixed, return_exceptions=True)
        assert engine.healthy
        after = await embed(model, TEXTS[0])
    assert max(len(batch) for batch in gate.seen) > 5
    assert isinstance(results.pop(), InferenceError)
    failure = results.pop(20)
    assert isinstance(failure, InferenceError)
    assert isinstance(failure.__cause__, ValueError)
    np.testing.assert_allclose(np.concatenate(results), expected, atol=1e-5)
    np.testing.assert_allclose(after[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
        ),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
async def test_a_batch_that_does_not_fit_is_halved(error: Exception) -> None:
    passed: list[int] = []

    def hook(batch: Sequence[EncodeItem]) -> None:
        if tokens(batch) > 60:
            raise error
        passed.append(tokens(batch))

    async with running() as engine:
        expected = await embed(engine.embedder(MINILM), *TEXTS)
    async with running(hook) as engine:
        model = engine.embedder(MINILM)
        result = await embed(model, *TEXTS)
        with pytest.raises(ServiceError) as too_large:
            await embed(model, text(100))
        assert engine.healthy
        await embed(model, TEXTS[0])
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert max(passed) > 30
    assert too_large.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert too_large.value.retry_after


async def test_every_nth_batch_failing_fails_exactly_the_calls_that_failed_alone() -> None:
    lock = threading.Lock()
    runs = 0
    condemned: set[tuple[int, ...]] = set()

    def hook(batch: Sequence[EncodeItem]) -> None:
        nonlocal runs
        with lock:
            runs += 1
            if runs % 5 == 0:
                if len(batch) == 1:
                    condemned.add(tuple(batch[0].token_ids.tolist()))
                raise RuntimeError("a fault now and then")

    async with running(hook) as engine:
        model = engine.embedder(MINILM)
        one_by_one = [await asyncio.gather(embed(model, each), return_exceptions=True) for each in TEXTS]
        failed = {
            ids(each)
            for each, (result,) in zip(TEXTS, one_by_one, strict=True)
            if isinstance(result, Exception)
        }
        assert len(failed) == len(TEXTS) // 5
        assert failed == condemned
        condemned.clear()
        results = await asyncio.gather(*(embed(model, each) for each in TEXTS), return_exceptions=True)
        failed = {
            ids(each) for each, result in zip(TEXTS, results, strict=True) if isinstance(result, Exception)
        }
        assert failed == condemned
        assert engine.healthy


async def test_a_model_that_loses_a_result_fails_the_call_only() -> None:
    async with running() as engine:
        model = engine.embedder(MINILM)
        model._submission._slot.lane.run = lambda items: []
        with pytest.raises(InferenceError) as failure:
            await embed(model, "x")
        assert "0 results for 1 items" in str(failure.value.__cause__)
        assert engine.healthy


class Killed(BaseException):
    """Nothing a worker may survive."""


@pytest.mark.parametrize(
    "error",
    [Killed(), torch.AcceleratorError("CUDA error: an illegal memory access")],
    ids=["thread", "device"],
)
async def test_a_dead_worker_ends_the_engine(error: BaseException) -> None:
    gate = Gate()

    def hook(batch: Sequence[EncodeItem]) -> None:
        gate(batch)
        if holds(batch, POISON):
            raise error

    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    async with running(hook) as engine:
        failures: list[bool] = []

        def on_failure() -> None:
            failures.append(engine.healthy)
            loop.call_soon_threadsafe(told.set)

        engine.on_failure = on_failure
        model = engine.embedder(MINILM)
        calls = [
            asyncio.ensure_future(embed(model, each)) for each in [POISON, *(text(200, n) for n in range(30))]
        ]
        await gate.reached()
        assert engine.healthy
        gate.open()
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 100)
        await asyncio.wait_for(told.wait(), 100)
        assert failures == [False]
        assert not engine.healthy
        with pytest.raises(ServiceError) as refused:
            await embed(model, "x")
    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    failed = [result for result in results if isinstance(result, ServiceError)]
    assert len(failed) >= 28
    assert results[0] in failed
    assert {each.code for each in failed} == {ErrorCode.SERVICE_UNAVAILABLE}
    assert all(isinstance(result, (ServiceError, np.ndarray)) for result in results)


async def test_a_broken_queue_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with running() as engine:
        engine.on_failure = told.set
        monkeypatch.setattr(engine._runtime._scheduler, "next_batch", broken)
        with pytest.raises(ServiceError):
            await asyncio.wait_for(embed(engine.embedder(MINILM), "x"), 100)
        assert await asyncio.to_thread(told.wait, 100)
        assert not engine.healthy

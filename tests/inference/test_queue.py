"""Work nobody waits for is not done; who asks for little is not kept waiting by who asks for much."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from prometheus_client import REGISTRY

from services.core.call import Priority
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions
from services.core.inference.device import TorchDevice, available_cores
from services.core.inference.jobs import Job, Lane
from services.core.inference.runtime import Runtime
from services.core.inference.scheduler import Scheduler
from services.core.modeling.types import EncodeItem
from tests.inference.support import MINILM, Gate, call, embed, ids, running, text


def dropped(reason: str) -> float:
    labels = {"model": MINILM, "reason": reason}
    return REGISTRY.get_sample_value("searchfoundation_dropped_items_total", labels) or 0.0


def queued(unit: str) -> float | None:
    return REGISTRY.get_sample_value(f"searchfoundation_queue_{unit}", {"model": MINILM})


async def test_cancelled_calls_cost_nothing() -> None:
    gate = Gate()
    before = dropped("cancelled")
    async with running(gate, dtype="auto") as engine:
        model = engine.embedder(MINILM)
        texts = [f"{text(6, seed)} {seed}" for seed in range(1000)]
        calls = [asyncio.ensure_future(embed(model, each)) for each in texts]
        await gate.reached()
        in_flight = set(gate.items)
        for each in calls[::2]:
            each.cancel()
        await asyncio.wait(calls[::2])
        gate.open()
        await asyncio.gather(*calls[1::2])
    wanted = {ids(each) for each in texts[1::2]}
    assert wanted <= set(gate.items) <= wanted | in_flight
    assert len(gate.items) == len(set(gate.items))
    cancelled_in_time = 500 - len(in_flight - wanted)
    assert dropped("cancelled") - before == cancelled_in_time


async def test_a_cancelled_call_of_many_texts_leaves_the_queue_whole() -> None:
    gate = Gate()
    async with running(gate, dtype="auto") as engine:
        model = engine.embedder(MINILM)
        large = asyncio.ensure_future(embed(model, *(text(20, seed) for seed in range(2048))))
        await gate.reached()
        assert queued("items") == 2048 - len(gate.items)
        large.cancel()
        await asyncio.wait([large])
        assert queued("items") == queued("tokens") == 0
        in_flight = len(gate.items)
        gate.open()
        await embed(model, "next")
    assert len(gate.items) == in_flight + 1


async def test_expired_calls_never_reach_the_model() -> None:
    gate = Gate()
    before = dropped("expired")
    async with running(gate, dtype="auto") as engine:
        model = engine.embedder(MINILM)
        holding = [asyncio.ensure_future(embed(model, text(300, seed))) for seed in range(2)]
        await gate.reached()
        late = [
            asyncio.ensure_future(embed(model, f"late {i}", deadline=time.monotonic() + 0.05 * (i - 1)))
            for i in range(4)
        ]
        results = await asyncio.gather(*late, return_exceptions=True)
        gate.open()
        await asyncio.gather(*holding)
        await embed(model, "in time", deadline=time.monotonic() + 60)
    assert [each.code for each in results if isinstance(each, ServiceError)] == [
        ErrorCode.SERVICE_TIMEOUT
    ] * 4
    assert set(gate.items) == {ids(text(300, 0)), ids(text(300, 1)), ids("in time")}
    assert dropped("expired") - before == 4


async def test_a_call_that_expires_while_it_runs_is_told_so() -> None:
    gate = Gate()
    async with running(gate, dtype="auto") as engine:
        with pytest.raises(ServiceError) as expired:
            await embed(engine.embedder(MINILM), "x", deadline=time.monotonic() + 0.05)
        gate.open()
    assert expired.value.code is ErrorCode.SERVICE_TIMEOUT


async def test_a_quiet_tenant_waits_for_one_batch_of_a_loud_one_at_most() -> None:
    gate = Gate()
    async with running(gate, dtype="auto") as engine:
        model = engine.embedder(MINILM)
        loud = [
            asyncio.ensure_future(embed(model, *(text(20, 50 * i + j) for j in range(50)), key_id="loud"))
            for i in range(6)
        ]
        await gate.reached()
        quiet = asyncio.ensure_future(embed(model, "a quiet word", key_id="quiet"))
        await asyncio.sleep(0)
        running_already = len(gate.seen)
        gate.open()
        await asyncio.gather(quiet, *loud)
    served_in = next(i for i, batch in enumerate(gate.seen) if ids("a quiet word") in batch)
    assert served_in == running_already


async def test_where_passes_are_short_calls_at_hand_are_one_batch() -> None:
    batches: list[int] = []

    def run(payloads: Sequence[int]) -> Sequence[int]:
        batches.append(len(payloads))
        return payloads

    lane = Lane("gathering", run, max_tokens=100, min_tokens=100)
    runtime = Runtime(Scheduler(10_000), TorchDevice(torch.device("cpu"), 1), workers=2, gathers=True)
    runtime.add(lane)
    runtime.start()

    async def ask(calls: int) -> list[list[int]]:
        jobs = [Job(lane, [number], [10]) for number in range(calls)]
        return await asyncio.gather(*(runtime.run(job, call()) for job in jobs))

    try:
        assert await ask(1) == [[0]]
        assert await ask(8) == [[number] for number in range(8)]
        assert batches == [1, 8]
        # More than a batch: one that is full need not wait for the rest.
        assert await ask(24) == [[number] for number in range(24)]
        assert len(batches) <= 2 + 4
    finally:
        await runtime.stop(1.0)


async def test_batch_work_runs_in_threads_that_the_kernel_lets_wait() -> None:
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    nice: dict[int, set[int]] = {}

    def note(batch: Sequence[EncodeItem]) -> None:
        """Hold long texts up; remember how nice the threads are that run texts of a length."""
        for item in batch:
            nice.setdefault(len(item.token_ids), set()).add(
                os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            )
        if len(batch[0].token_ids) > 100:
            loop.call_soon_threadsafe(begun.set)
            assert release.wait(30)

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    async with running(note) as engine:
        model = engine.embedder(MINILM)
        texts = [text(120, seed) for seed in range(64)]
        job = asyncio.ensure_future(model.embed(texts, EmbedOptions(), call(priority=Priority.BATCH)))
        await begun.wait()
        # However many passes of the job are held up, a call finds a worker.
        await embed(model, text(10))
        release.set()
        await job
    (short, interactive), (long, background) = sorted(nice.items())
    assert short < 100 < long
    assert interactive == {usual}
    assert background == {min(19, usual + 12)}


async def test_one_worker_of_the_background_rests_while_calls_come() -> None:
    gate = Gate()

    def hold(batch: Sequence[EncodeItem]) -> None:
        if len(batch[0].token_ids) > 100:
            gate(batch)

    workers = TorchDevice(torch.device("cpu"), available_cores()).background
    async with running(hold) as engine:
        model = engine.embedder(MINILM)
        quiet = asyncio.Event()

        async def call_on_and_on() -> None:
            while not quiet.is_set():
                await embed(model, text(10))

        await embed(model, text(10))
        calls = asyncio.create_task(call_on_and_on())
        texts = [text(120, seed) for seed in range(64)]
        job = asyncio.ensure_future(model.embed(texts, EmbedOptions(), call(priority=Priority.BATCH)))
        await gate.reached()
        assert len(gate.seen) == max(1, workers - 1)
        quiet.set()
        await calls
        while len(gate.seen) < workers:
            await gate.reached()
        gate.open()
        await job


async def test_overload_is_refused_at_once_by_the_same_rule_for_one_text_and_for_many() -> None:
    gate = Gate()
    before = dropped("refused")
    async with running(gate, dtype="auto", max_queue_tokens=1000) as engine:
        model = engine.embedder(MINILM)
        accepted = [asyncio.ensure_future(embed(model, *(text(18, seed) for seed in range(5))))]
        await gate.reached()
        while not accepted[-1].done():
            accepted.append(asyncio.ensure_future(embed(model, *(text(18, seed) for seed in range(5)))))
            await asyncio.sleep(0.005)
        assert accepted.pop().exception()
        refused = await asyncio.gather(
            embed(model, "one"), embed(model, *(["many"] * 200)), return_exceptions=True
        )
        assert 1000 <= (queued("tokens") or 0) < 1200
        gate.open()
        results = await asyncio.gather(*accepted)
        await embed(model, "and after")
    assert all(len(each) == 5 for each in results)
    for each in refused:
        assert isinstance(each, ServiceError)
        assert each.code is ErrorCode.SERVICE_UNAVAILABLE
        assert each.retry_after is not None
        assert 1 <= each.retry_after <= 60
    assert dropped("refused") - before == 5 + 1 + 200


async def test_a_queue_that_others_have_filled_has_room_for_a_little_of_everybodys() -> None:
    gate = Gate()
    async with running(gate, dtype="auto", max_queue_tokens=1600) as engine:
        model = engine.embedder(MINILM)
        heavy = asyncio.ensure_future(embed(model, *(text(18, seed) for seed in range(200)), key_id="heavy"))
        await gate.reached()
        waiting = [asyncio.ensure_future(embed(model, "hello", key_id="light")) for _ in range(3)]
        for _ in range(200):
            if (queued("items") or 0) >= 200 - len(gate.items) + len(waiting):
                break
            await asyncio.sleep(0.01)
        for tenant, texts in (("heavy", ["x"]), ("light", [text(150)])):
            with pytest.raises(ServiceError) as refused:
                await embed(model, *texts, key_id=tenant)
            assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
        gate.open()
        await asyncio.gather(heavy, *waiting)


async def test_texts_being_tokenised_count_as_queued() -> None:
    async with running(dtype="auto", max_queue_tokens=1000) as engine:
        model = engine.embedder(MINILM)
        calls = [embed(model, text(300, seed), truncate=True) for seed in range(40)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    answers = [each for each in results if not isinstance(each, BaseException)]
    refusals = [each for each in results if isinstance(each, ServiceError)]
    assert answers
    assert refusals
    assert len(answers) + len(refusals) == 40


async def test_charges_before_the_model_runs_and_only_what_is_taken() -> None:
    gate = Gate()
    charged: list[tuple[int, int]] = []

    async def charge(tokens: int) -> None:
        charged.append((tokens, len(gate.items)))
        if tokens > 10:
            raise ServiceError(ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED, current=tokens, limit=10)

    async with running(gate, dtype="auto") as engine:
        gate.open()
        model = engine.embedder(MINILM)
        await model.embed(["hello world", "hello"], EmbedOptions(), call(charge=charge))
        with pytest.raises(ServiceError) as too_much:
            await model.embed([text(30)], EmbedOptions(), call(charge=charge))
    assert charged == [(7, 0), (32, 2)]
    assert too_much.value.code is ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED
    assert len(gate.items) == 2

"""The tokenise stage under texts of every size and kind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio
import torch

from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions
from services.core.inference.device import TorchDevice
from services.core.inference.tokenizing import TextThreads
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


@pytest.mark.parametrize(
    ("device", "cores", "threads"), [("cpu", 8, 4), ("cuda", 2, 2), ("cuda", 16, 13), ("cuda", 64, 16)]
)
def test_texts_get_the_cores_that_are_left(device: str, cores: int, threads: int) -> None:
    assert TorchDevice(torch.device(device), cores).text_threads == threads


class Lengths:
    """Work on texts that says how long they are, where it was done, and how many at once."""

    def __init__(self) -> None:
        self.done: list[tuple[int, bool]] = []

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.done.append((len(texts), threading.current_thread() is threading.main_thread()))
        if "bad" in texts:
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="bad")
        return [len(each.encode()) for each in texts]


class TestSmallCallsThatComeTogether:
    """As beside a CUDA device, where threads of their own tokenise for many callers of one text."""

    @pytest_asyncio.fixture
    async def threads(self) -> AsyncIterator[TextThreads]:
        with ThreadPoolExecutor(1) as executor:
            threads = TextThreads(executor, 1, joins=True)
            yield threads
            threads.close()

    async def test_one_alone_is_worked_on_at_once(self, threads: TextThreads) -> None:
        work = Lengths()
        assert await threads.map(["a", "bb"], work, key="k") == [1, 2]
        assert work.done == [(2, True)]

    async def test_those_of_a_key_are_one_piece_of_work_in_a_thread(self, threads: TextThreads) -> None:
        works = {"x": Lengths(), "y": Lengths()}
        texts = [["t" * i, "u"] for i in range(1, 21)]
        found = await asyncio.gather(
            *(threads.map(each, works["xy"[i % 2]], key="xy"[i % 2]) for i, each in enumerate(texts))
        )
        assert found == [[i, 1] for i in range(1, 21)]
        assert [work.done for work in works.values()] == [[(20, False)]] * 2

    async def test_without_a_key_none_is_joined(self, threads: TextThreads) -> None:
        work = Lengths()
        await asyncio.gather(*(threads.map(["a"], work) for _ in range(20)))
        assert work.done == [(1, True)] * 20

    async def test_a_bad_one_fails_alone(self, threads: TextThreads) -> None:
        texts = ["fine", "bad", "\ud800", *["good"] * 6]
        found = await asyncio.gather(
            *(threads.map([each], Lengths(), key="k") for each in texts), return_exceptions=True
        )
        assert found[0] == [4]
        assert found[3:] == [[4]] * 6
        for failure in found[1:3]:
            assert isinstance(failure, ServiceError)
            assert failure.code is ErrorCode.INPUT_INVALID
        assert "not valid Unicode" in str(found[2].detail)  # type: ignore[union-attr]

    async def test_one_that_leaves_does_not_take_others_along(self, threads: TextThreads) -> None:
        calls = [asyncio.ensure_future(threads.map(["word"], Lengths(), key="k")) for _ in range(10)]
        await asyncio.sleep(0)
        calls[3].cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(found.pop(3), asyncio.CancelledError)
        assert found == [[4]] * 9

    async def test_the_end_of_the_threads_reaches_those_who_wait(self) -> None:
        executor = ThreadPoolExecutor(1)
        threads = TextThreads(executor, 1, joins=True)
        held = threading.Event()
        executor.submit(held.wait, 60)
        calls = [asyncio.ensure_future(threads.map(["word"], Lengths(), key="k")) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        executor.shutdown(wait=False, cancel_futures=True)
        held.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError | RuntimeError) for each in found)
        late = [threads.map(["word"], Lengths(), key="k") for _ in range(10)]
        assert all(
            isinstance(each, RuntimeError) for each in await asyncio.gather(*late, return_exceptions=True)
        )
        threads.close()


async def test_vectors_are_the_same_where_small_calls_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    gate.open()
    texts = [text(3 + i % 5) for i in range(20)]
    async with running(gate) as engine:
        model = engine.embedder(MINILM)
        alone = [await embed(model, each) for each in texts]
        monkeypatch.setattr(model.threads, "_joins", True)
        together = await asyncio.gather(*(embed(model, each) for each in texts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)

"""Answers through the engine: in company, cut off, refused, sampled, beside other work."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
import pytest_asyncio
import torch

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.content import Image
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, Engine
from services.core.inference.answering import AnswerOptions, ChatModel, Turn
from services.core.inference.generation import Room
from services.core.inference.sampling import Chosen, Sampler, Sampling
from services.core.modeling.layers.causal import BLOCK, Chunk
from services.core.modeling.types import Feature, Message, UnfitInputError
from tests.rig import MINILM, settings
from tests.vlm_references import Reference
from tests.vlm_served import CACHE_BYTES, ENDLESS, PARROT, RANDOM, SAID, write_answering

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answering(tmp_path_factory.mktemp("answering"))


@asynccontextmanager
async def engine_of(folder: Path, *models: str, **values: Any) -> AsyncIterator[Engine]:
    chosen = settings(models=models, model_dir=folder, **{"chat_cache_bytes": CACHE_BYTES, **values})
    engine = await Engine.start(chosen, Catalog.load(folder / "catalog.yaml"))
    try:
        yield engine
    finally:
        await engine.stop(5.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    async with engine_of(folder, RANDOM, PARROT, ENDLESS) as started:
        yield started


def user(text: str) -> list[Turn]:
    return [Turn("user", (text,))]


async def said(model: ChatModel, text: str, call: Call | None = None, **options: Any) -> tuple[str, str, int]:
    async with model.answer(user(text), AnswerOptions(**options), call or Call("x")) as answer:
        pieces = [piece async for piece in answer]
        assert answer.finish is not None
        return "".join(piece.text for piece in pieces), answer.finish, answer.said


def room_of(model: ChatModel) -> Room:
    assert model._slot.processor is not None
    return model._slot.processor


def used(model: ChatModel) -> int:
    pool = room_of(model).pool
    return pool.count - pool.available


async def test_an_answer_is_that_of_float64_whoever_shares_the_batch(engine: Engine, folder: Path) -> None:
    reference, model = Reference(folder / RANDOM), engine.chat(RANDOM)
    texts = ["hello world", "x" * 150, "Qué? 🎉", "hello " * 40, "a", "b" * 65, "c" * 63, "d" * 64]
    answers = await asyncio.gather(*(said(model, text, most=12) for text in texts))
    pieces = room_of(model).processor.pieces
    for text, (written, _, _) in zip(texts, answers, strict=True):
        turn = {"role": "user", "content": [{"type": "text", "text": text}]}
        _, states = reference.prompt([turn], [])
        ids = reference.greedy(states, 12)
        ends = [i for i, id in enumerate(ids) if id in room_of(model).processor.ends]
        kept = ids[: ends[0]] if ends else ids
        assert written == b"".join(pieces[id] for id in kept).decode(errors="replace")
    assert used(model) == 0


async def test_characters_come_whole_and_the_end_is_told(engine: Engine) -> None:
    model = engine.chat(PARROT)
    async with model.answer(user("hello"), AnswerOptions(), Call("x")) as answer:
        texts = [piece.text async for piece in answer]
    assert "".join(texts) == SAID
    assert "🎉" in texts
    assert (answer.finish, answer.said) == ("stop", len(SAID.encode()))
    assert await said(model, "hello", most=5) == ("Hi �", "length", 5)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(("🎉é",), "Hi "), ((",you!",), "Hi 🎉é"), (("never", "y"), "Hi 🎉é,"), ((",you?",), SAID)],
)
async def test_a_stop_over_several_tokens_is_never_shown(
    engine: Engine, stops: tuple[str, ...], expected: str
) -> None:
    assert (await said(engine.chat(PARROT), "hello", stops=stops))[0] == expected


async def test_callers_that_go_leave_no_blocks_held(engine: Engine) -> None:
    model, charged = engine.chat(ENDLESS), Counter[int]()
    room = asyncio.Semaphore(16)  # more would not fit into the cache, and be refused

    async def go_away(number: int) -> None:
        async def charge(tokens: int) -> None:
            charged[number] += tokens

        call = Call(str(number), charge=charge)
        asked = model.answer(user("x" * number), AnswerOptions(most=3000), call)
        async with room, asked as answer:
            async for _ in answer:
                if answer.said >= 3 + number % 5:
                    break
            assert answer.said < 3000
        assert charged[number] == call.usage_tokens >= answer.prompt.total + 3

    await asyncio.wait_for(asyncio.gather(*(go_away(n) for n in range(50))), 60)
    assert used(model) == 0
    assert (await said(model, "hello", most=4))[0] == "<abc"


async def test_a_full_cache_lets_wait_then_refuses_then_recovers(folder: Path) -> None:
    async with engine_of(folder, ENDLESS) as probe:
        size = room_of(probe.chat(ENDLESS)).generator.block_bytes
    async with engine_of(folder, ENDLESS, chat_cache_bytes=4 * size) as engine:
        model = engine.chat(ENDLESS)
        with pytest.raises(ServiceError) as caught:
            await said(model, "x", most=5 * BLOCK)
        assert caught.value.code is ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED
        running = model.answer(user("x"), AnswerOptions(most=200), Call("x"))
        async with running as first:
            await anext(aiter(first))
            waiting = [asyncio.ensure_future(said(model, "y", most=100)) for _ in range(2)]
            async with asyncio.timeout(30):
                while model._generation._waiting.count < 2:  # noqa: ASYNC110 - nobody tells of it
                    await asyncio.sleep(0.001)
            with pytest.raises(ServiceError) as caught:
                await said(model, "z", most=100)
            assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
            assert caught.value.retry_after is not None
        for text, why, count in await asyncio.gather(*waiting):
            assert (text[:4], why, count) == ("<abc", "length", 100)
        assert used(model) == 0


async def test_a_beginning_that_is_in_memory_is_not_computed_again(engine: Engine) -> None:
    model, text = engine.chat(RANDOM), "s" * 200
    async with model.answer(user(text), AnswerOptions(most=8), Call("x")) as cold:
        first = "".join([piece.text async for piece in cold])
    async with model.answer(user(text), AnswerOptions(most=8), Call("x")) as warm:
        again = "".join([piece.text async for piece in warm])
    assert (cold.shared, warm.shared) == (0, 3 * BLOCK)
    assert first == again
    async with model.answer(user("t" + text), AnswerOptions(most=1), Call("x")) as other:
        assert [piece async for piece in other]
    assert other.shared == 0


async def test_a_deadline_ends_an_answer(engine: Engine) -> None:
    call = Call("x")
    call.deadline = call.started + 0.3
    with pytest.raises(ServiceError) as caught:
        await said(engine.chat(ENDLESS), "x", call, most=3900)
    assert caught.value.code is ErrorCode.SERVICE_TIMEOUT
    assert used(engine.chat(ENDLESS)) == 0


async def test_an_answer_is_held_to_its_schema(engine: Engine) -> None:
    model = engine.chat(RANDOM)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["é", "no"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text, why, _ = await said(model, "hello", most=200, schema=schema)
    found = json.loads(text)
    assert (set(found), why) == ({"a", "b"}, "stop")
    with pytest.raises(ServiceError, match="schema"):
        await said(model, "hello", schema={"type": "no such type"})


async def test_a_seed_repeats_an_answer_in_any_company(engine: Engine) -> None:
    model = engine.chat(RANDOM)

    async def drawn(seed: int) -> str:
        return (await said(model, "hello", most=16, sampling=Sampling(temperature=1.0), seed=seed))[0]

    alone = [await drawn(seed) for seed in range(3)]
    assert len(set(alone)) == 3
    together = await asyncio.gather(*(drawn(seed) for seed in range(3)), *(drawn(9) for _ in range(3)))
    assert together[:3] == alone


class Watched:
    """Writes the chunks of each step of a model down, and may hold steps up."""

    def __init__(self, model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = room_of(model).generator
        self._step = generator.step
        self.steps: list[list[Chunk]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(generator, "step", self)

    def __call__(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.steps.append(list(chunks))
        if not self.go_on.is_set():
            self.begun.set()
            assert self.go_on.wait(60)
        return self._step(chunks)

    async def hold(self) -> None:
        """Hold the next step up, and wait until it has begun."""
        self.begun.clear()
        self.go_on.clear()
        assert await asyncio.to_thread(self.begun.wait, 60)


async def test_a_short_prompt_does_not_wait_for_a_long_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine.chat(RANDOM)
    watched = Watched(model, monkeypatch)
    long = asyncio.ensure_future(said(model, "l" * 3000, most=1))
    assert await asyncio.to_thread(watched.begun.wait, 60)
    short = asyncio.ensure_future(said(model, "short", most=1))
    async with asyncio.timeout(60):
        while not model._generation._waiting:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.001)
    watched.go_on.set()
    assert (await short)[2] == (await long)[2] == 1
    asking = [
        (number, chunk.end) for number, step in enumerate(watched.steps) for chunk in step if chunk.asks
    ]
    (answered, _), (read, length) = asking
    assert answered <= 2
    # The long one had at least half of each step meanwhile, and all of those that were its alone.
    assert read <= 2 + length // BLOCK
    assert all(max(len(chunk.ids) for chunk in step) >= BLOCK // 2 for step in watched.steps[:read])


async def test_an_embedding_call_waits_for_the_step_under_way_and_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one core there is one worker: what the steps of the answers take, the calls wait for.
    async with engine_of(folder, ENDLESS, MINILM, cores=1) as engine:
        model, embedder = engine.chat(ENDLESS), engine.embedder(MINILM)
        watched = Watched(model, monkeypatch)
        watched.go_on.set()
        answers = [asyncio.ensure_future(said(model, "x" * n, most=1500)) for n in range(16)]
        lane, steps_before = engine._slots[MINILM].lane, list[int]()
        run = lane.run

        def counted(items: Sequence[Any]) -> Sequence[Any]:
            steps_before.append(len(watched.steps))
            return run(items)

        monkeypatch.setattr(lane, "run", counted)
        async with asyncio.timeout(120):
            while len(model._generation._running) < 16:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)
            for number in range(10):
                await watched.hold()
                begun = len(watched.steps)
                embed = embedder.embed([f"text {number}"] * 3, EmbedOptions(), Call("x"))
                call = asyncio.ensure_future(embed)
                while lane.queued_items < 3:  # noqa: ASYNC110 - nobody tells of it
                    await asyncio.sleep(0.001)
                watched.go_on.set()
                await call
                assert steps_before == [begun]
                steps_before.clear()
        assert not any(answer.done() for answer in answers)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        assert used(model) == 0


async def test_what_others_have_asked_is_not_to_be_seen(engine: Engine) -> None:
    model, text = engine.chat(RANDOM), "k" * 200
    shared: list[int] = []
    for key_id in ("one", "one", "other"):
        async with model.answer(user(text), AnswerOptions(most=1), Call("x", key_id=key_id)) as answer:
            assert [piece async for piece in answer]
        shared.append(answer.shared)
    assert shared[0] == shared[2] == 0
    assert shared[1] > 0


@pytest.mark.parametrize("when", ["it waits", "its prompt is read", "its picture is looked at"])
async def test_nothing_is_held_of_one_that_is_left_before_it_speaks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    model = engine.chat(RANDOM)
    generation, watched = model._generation, Watched(model, monkeypatch)
    picture = Image(np.zeros((28, 28, 3), np.uint8), (28, 28))
    looking, go_on = threading.Event(), threading.Event()
    generator = room_of(model).generator
    look = generator.look

    def held(feature: Feature, part: int) -> torch.Tensor:
        looking.set()
        assert go_on.wait(60)
        return look(feature, part)

    monkeypatch.setattr(generator, "look", held)
    turns = [Turn("user", ("p" * 300,))]
    first = []
    if when == "its picture is looked at":
        prepared = room_of(model).processor.prepare([Message("user", (picture, "hello"))])
        monkeypatch.setattr(model, "_prepared", AsyncMock(return_value=prepared))
    elif when == "it waits":
        monkeypatch.setattr("services.core.inference.generation._MOST_RUNNING", 1)
        first = [asyncio.ensure_future(said(model, "first", most=5))]
        assert await asyncio.to_thread(watched.begun.wait, 60)
    call = Call("x")

    async def ask() -> None:
        async with model.answer(turns, AnswerOptions(most=5), call) as answer:
            assert [piece async for piece in answer]

    asked = asyncio.ensure_future(ask())
    if when == "its picture is looked at":
        assert await asyncio.to_thread(looking.wait, 60)
    elif when == "its prompt is read":
        assert await asyncio.to_thread(watched.begun.wait, 60)
    else:
        async with asyncio.timeout(60):
            while not generation._waiting:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)
    asked.cancel()
    await asyncio.sleep(0)
    watched.go_on.set()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await asyncio.gather(*first)
    assert (used(model), generation._running, generation._waiting.count) == (0, [], 0)
    assert call.usage_tokens > 0
    monkeypatch.undo()
    assert (await said(model, "hello", most=2))[2] == 2


async def test_a_schema_that_is_too_much_ends_its_own_answer_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine.chat(RANDOM)

    def broken(self: Sampler, logits: object, given: Sequence[int]) -> Chosen:
        if len(given) == 3:
            raise UnfitInputError("too much")
        return Chosen(5)

    watched = Watched(model, monkeypatch)
    monkeypatch.setattr(Sampler, "choose", broken)
    others = [asyncio.ensure_future(said(model, f"{n}", most=30)) for n in range(3)]
    bad = asyncio.ensure_future(said(model, "x", most=30, sampling=Sampling(temperature=1.0)))
    watched.go_on.set()
    with pytest.raises(ServiceError, match="too much") as caught:
        await bad
    assert caught.value.code is ErrorCode.INPUT_INVALID
    assert all(count > 0 for _, _, count in await asyncio.gather(*others))
    assert used(model) == 0


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(1100)}},
        _deep(400),
        {"enum": []},
        {"$ref": "http://127.0.0.1:1/schema.json"},
    ],
    ids=["endless", "wide", "deep", "empty", "elsewhere"],
)
async def test_schemas_that_are_refused(engine: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(ServiceError, match="cannot be held to this schema") as caught:
        await said(engine.chat(RANDOM), "hello", schema=schema)
    assert caught.value.code is ErrorCode.INPUT_INVALID


async def test_next_to_no_temperature_takes_the_most_likely(engine: Engine) -> None:
    model = engine.chat(RANDOM)
    likely = await said(model, "hello", most=12)
    assert await said(model, "hello", most=12, sampling=Sampling(temperature=1e-310)) == likely

"""How long the bytes of media are counted: from before they come to the end of the passes that read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from services.core.catalog import Catalog
from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Media
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, Engine, InferenceError
from services.core.inference.loading import load_model
from services.core.inference.scoring import ScoreOptions
from services.core.media.room import MediaRoom
from services.core.modeling.types import EncodeItem, Encoding
from services.core.settings import Settings
from tests import clip_checkpoints, omni_checkpoints, vision_checkpoints
from tests.inference.support import Gate, Hook, call, nothing, settings
from tests.media.films import film
from tests.media.pictures import noise, photograph, saved
from tests.media.web import answer, web

CLIP, OMNI, RERANKER = "jina-clip-v1", "jina-embeddings-v5-omni-nano", "jina-reranker-m0"
WRITE: dict[str, Callable[[Path, str], object]] = {
    CLIP: clip_checkpoints.write_model,
    OMNI: omni_checkpoints.write_served,
    RERANKER: vision_checkpoints.write_served,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model, write in WRITE.items():
        write(folder, model)
    return folder


class Hooked:
    """A real network that tells ``hook`` of each batch before it runs it."""

    def __init__(self, network: Any, hook: Hook) -> None:
        self._network = network
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, batch: Sequence[EncodeItem]) -> Sequence[Encoding]:
        self._hook(batch)
        return self._network.forward(batch)


@asynccontextmanager
async def running(
    models: Path, model: str, hook: Hook = nothing, **values: Any
) -> AsyncIterator[tuple[Engine, MediaRoom]]:
    chosen = settings(
        models=(model,),
        model_dir=models,
        fetch_allow_networks=("127.0.0.1/32",),
        media_decoders=2,
        **values,
    )

    def load(spec: ModelSpec, chosen: Settings, device: torch.device) -> Any:
        return Hooked(load_model(spec, chosen, device), hook)

    room = MediaRoom(chosen)
    engine = await Engine.start(chosen, Catalog.load(), load=load, opener=room)
    try:
        yield engine, room
    finally:
        await engine.stop(10.0)
        await room.aclose()


def embed(engine: Engine, model: str, *media: Media, **values: Any) -> asyncio.Task[Any]:
    work = engine.embedder(model).embed(media, EmbedOptions(), call(**values))
    return asyncio.create_task(work)


async def until(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not said():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def at_the_gate(gate: Gate) -> None:
    await until(lambda: bool(gate.seen))


def picture(source: str | bytes) -> Media:
    return Media(Modality.IMAGE, source)


async def test_the_pass_ends_what_a_picture_takes(models: Path) -> None:
    gate, data = Gate(), photograph()
    pixels = 32 * 32 * 3
    async with running(models, CLIP, gate) as (engine, room), web(answer(data)) as site:
        task = embed(engine, CLIP, picture(data), picture(site.url()))
        await at_the_gate(gate)
        # What was fetched is gone; what came with the call is there as long as that.
        assert room.budget.held == len(data) + 2 * pixels
        assert room.pixels.held == 0
        gate.open()
        await task
        assert room.budget.held == 0


@pytest.mark.parametrize("kind", [Modality.IMAGE, Modality.VIDEO])
async def test_patches_are_counted_until_they_have_been_read(models: Path, kind: Modality) -> None:
    data = saved(noise(64, 64)) if kind is Modality.IMAGE else film("mp4", "mpeg4", 4, (64, 64))
    found: list[int] = []
    gate = Gate()

    def hook(batch: Sequence[EncodeItem]) -> None:
        found.extend(feature.data.nbytes for item in batch for feature in item.features)
        gate(batch)

    async with running(models, OMNI, hook) as (engine, room):
        task = embed(engine, OMNI, Media(kind, data))
        await at_the_gate(gate)
        assert sum(found) > 64 * 64 * 3
        assert room.budget.held == len(data) + sum(found)
        gate.open()
        await task
        assert room.budget.held == 0


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_pass_that_outlives_its_call_is_still_counted(models: Path) -> None:
    gate, data = Gate(), photograph()
    async with running(models, CLIP, gate) as (engine, room):
        task = embed(engine, CLIP, picture(data))
        await at_the_gate(gate)
        held = room.budget.held
        assert held > len(data)
        await cancelled(task)
        assert room.budget.held == held
        gate.open()
        await until(lambda: room.budget.held == 0)


async def test_a_call_that_is_cancelled_in_the_queue_gives_its_share_back(models: Path) -> None:
    gate, data = Gate(), photograph()
    async with running(models, CLIP, gate) as (engine, room):
        running_ones: list[asyncio.Task[Any]] = []
        for count in range(engine._device.workers):
            running_ones.append(embed(engine, CLIP, picture(data)))
            await until(lambda count=count: len(gate.seen) > count)
        held = room.budget.held
        queued = embed(engine, CLIP, picture(data), key_id="another")
        lane = engine._slots[CLIP].lane
        await until(lambda: lane.queued_items == 1)
        assert room.budget.held > held
        await cancelled(queued)
        assert room.budget.held == held
        gate.open()
        await asyncio.gather(*running_ones)
        assert room.budget.held == 0


async def test_a_call_that_fails_gives_its_share_back(models: Path) -> None:
    def broken(batch: Sequence[EncodeItem]) -> None:
        raise RuntimeError("no pass today")

    async with running(models, CLIP, broken) as (engine, room):
        with pytest.raises(InferenceError):
            await embed(engine, CLIP, picture(photograph()))
        await until(lambda: room.budget.held == 0)

        async def no_tokens_left(tokens: int) -> None:
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="none left")

        with pytest.raises(ServiceError, match="none left"):
            await embed(engine, CLIP, picture(photograph()), charge=no_tokens_left)
        with pytest.raises(ServiceError, match="cannot be used"):
            await embed(engine, CLIP, picture(photograph()), picture(b"GIF89a"))
        assert room.budget.held == room.pixels.held == 0


async def test_calls_with_media_on_both_sides_never_wait_for_each_other(models: Path) -> None:
    """A bound that one picture exceeds: who held its query while it waits for its documents would stay."""
    query, document = picture(saved(noise(40, 40))), picture(saved(noise(40, 30)))
    async with running(models, RERANKER, media_bytes_in_flight=2048) as (engine, room):
        scorer = engine.scorer(RERANKER)

        async def score(number: int) -> float:
            mine = call(key_id=f"key {number}")
            return (await scorer.score(query, [document], ScoreOptions(), mine)).values[0]

        async with asyncio.timeout(120):
            scores = await asyncio.gather(*map(score, range(8)))
        assert len(set(scores)) == 1
        assert room.budget.held == room.pixels.held == 0

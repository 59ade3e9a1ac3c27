"""Models that come and go: the engine under one budget of memory, over tiny encoders of equal size."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, Engine, EngineStartError, ScoreOptions, memory, residency
from services.core.inference.loading import load_model, model_weight_bytes
from services.core.inference.memory import held_bytes
from services.core.modeling.types import Backend
from services.core.settings import Settings
from tests.inference.support import Gate, Watched, call, embed, settings
from tests.tiny import NAMES, write_catalog, write_weights

ONE, TWO, THREE = NAMES
TEXTS = ["hello world", "the quick brown fox", "a lazy dog, a fox"]
CPU = torch.device("cpu")
EMBED = EmbedOptions()


@dataclass
class Loads:
    """A loader that writes down what it loads, and can be made to wait or to fail."""

    names: list[str] = field(default_factory=list[str])
    networks: dict[str, weakref.ref[Any]] = field(default_factory=dict[str, "weakref.ref[Any]"])
    hooks: dict[str, Gate] = field(default_factory=dict[str, Gate])
    errors: dict[str, Exception] = field(default_factory=dict[str, Exception])
    begun: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.goes_on.set()

    def __call__(self, spec: ModelSpec, chosen: Settings, device: torch.device) -> Backend[Any]:
        self.names.append(spec.id)
        self.begun.set()
        assert self.goes_on.wait(30)
        if spec.id in self.errors:
            raise self.errors[spec.id]
        network = load_model(spec, chosen, device)
        self.networks[spec.id] = weakref.ref(network)
        return Watched(network, self.hooks[spec.id]) if spec.id in self.hooks else network  # type: ignore[arg-type]

    async def wait(self) -> None:
        """Return when a load has begun."""
        assert await asyncio.to_thread(self.begun.wait, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of all three, which no test changes."""
    made = tmp_path_factory.mktemp("models")
    write_catalog(made)
    write_weights(made)
    return made


def chosen(folder: Path, **values: Any) -> Settings:
    lazy = {"models": NAMES, "model_dir": folder, "model_residency": "lazy"}
    return settings(**{**lazy, **values})


def size(folder: Path) -> int:
    catalog = Catalog.load(folder / "catalog.yaml")
    return model_weight_bytes(catalog.require(ONE), chosen(folder), CPU)


@asynccontextmanager
async def serving(
    folder: Path, loads: Callable[..., Backend[Any]] = load_model, *, room: float | None = None, **values: Any
) -> AsyncIterator[Engine]:
    """An engine with memory for ``room`` of the models."""
    if room is not None:
        values["device_memory_bytes"] = int(room * size(folder))
    catalog = Catalog.load(folder / "catalog.yaml", {"first": ONE})
    engine = await Engine.start(chosen(folder, **values), catalog, load=loads)
    try:
        yield engine
    finally:
        await engine.stop(10.0)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, np.ndarray]:
    """The vectors of ``TEXTS`` by each model, from an engine that keeps them all in memory."""

    async def vectors() -> dict[str, np.ndarray]:
        async with serving(folder, model_residency="eager") as engine:
            assert [resident(name) for name in NAMES] == [1, 1, 1]
            return {name: await embed(engine.embedder(name), *TEXTS) for name in NAMES}

    return asyncio.run(vectors())


def figure(name: str, model: str) -> float:
    return REGISTRY.get_sample_value(f"searchfoundation_model_{name}", {"model": model}) or 0.0


def resident(model: str) -> float:
    return figure("resident", model)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_a_model_is_loaded_at_its_first_call(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    loads = Loads()
    async with serving(folder, loads) as engine:
        assert [spec.id for spec in engine.served] == [*NAMES, "first"]
        assert engine.healthy
        assert loads.names == []
        before = figure("loads_total", TWO)
        first = call()
        found = await engine.embedder(TWO).embed(TEXTS, EMBED, first)
        assert found.vectors.shape == (3, 32)
        assert first.timings.queue > 0
        np.testing.assert_allclose(await embed(engine.embedder(TWO), *TEXTS), wanted[TWO], atol=1e-6)
        assert loads.names == [TWO]
        assert figure("loads_total", TWO) == before + 1
        assert figure("bytes", TWO) == size(folder)
        assert [resident(name) for name in NAMES] == [0, 1, 0]
    assert resident(TWO) == 0


async def test_names_of_one_model_share_its_weights(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    loads = Loads()
    async with serving(folder, loads) as engine:
        np.testing.assert_allclose(await embed(engine.embedder("first"), *TEXTS), wanted[ONE], atol=1e-6)
        await embed(engine.embedder(ONE), "x")
        await engine.scorer("first").score("x", ["y"], ScoreOptions(), call())
        assert loads.names == [ONE]


async def test_what_was_used_least_recently_makes_room(folder: Path) -> None:
    loads = Loads()
    async with serving(folder, loads, room=2.5) as engine:
        before = {name: figure("unloads_total", name) for name in NAMES}
        for name in (ONE, TWO, ONE, THREE, ONE, TWO):
            await embed(engine.embedder(name), "hello")
        assert loads.names == [ONE, TWO, THREE, TWO]
        assert [resident(name) for name in NAMES] == [1, 1, 0]
        gone = {name: figure("unloads_total", name) - before[name] for name in NAMES}
        assert gone == {ONE: 0, TWO: 1, THREE: 1}
        assert figure("bytes", THREE) == 0


async def test_a_model_stays_while_a_call_uses_it(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    gate = Gate()
    loads = Loads(hooks={ONE: gate})
    async with serving(folder, loads, room=1) as engine:
        using = asyncio.ensure_future(embed(engine.embedder(ONE), *TEXTS))
        await gate.reached()
        waiting = asyncio.ensure_future(embed(engine.embedder(TWO), *TEXTS))
        await asyncio.sleep(0.2)
        assert loads.names == [ONE]
        assert resident(ONE) == 1
        gate.open()
        np.testing.assert_allclose(await using, wanted[ONE], atol=1e-6)
        np.testing.assert_allclose(await waiting, wanted[TWO], atol=1e-6)
        assert loads.names == [ONE, TWO]
        assert resident(ONE) == 0


async def test_a_model_stays_while_a_call_prepares(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    charged, paid = asyncio.Event(), asyncio.Event()

    async def charge(_: int) -> None:
        charged.set()
        await paid.wait()

    loads = Loads()
    async with serving(folder, loads, room=1) as engine:
        using = asyncio.ensure_future(embed(engine.embedder(ONE), *TEXTS, charge=charge))
        await charged.wait()
        waiting = asyncio.ensure_future(embed(engine.embedder(TWO), *TEXTS))
        await asyncio.sleep(0.2)
        assert loads.names == [ONE]
        paid.set()
        np.testing.assert_allclose(await using, wanted[ONE], atol=1e-6)
        np.testing.assert_allclose(await waiting, wanted[TWO], atol=1e-6)


async def test_the_traffic_of_one_model_does_not_keep_out_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_MOMENT_SECONDS", 0.05)
    served = {ONE: 0, TWO: 0}
    async with serving(folder, room=1) as engine, asyncio.timeout(120):

        async def traffic(name: str) -> None:
            while min(served.values()) < 6:
                await embed(engine.embedder(name), "hello")
                served[name] += 1

        await asyncio.gather(*(traffic(name) for name in (ONE, ONE, ONE, TWO, TWO, TWO)))


def test_memory_is_given_back(folder: Path) -> None:
    """In a process of its own, where no other test has left memory to the allocator."""
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from tests.inference.test_residency import gives_memory_back\n"
        "asyncio.run(gives_memory_back(Path(sys.argv[1])))"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


async def gives_memory_back(folder: Path) -> None:
    catalog = Catalog.load(folder / "catalog.yaml")
    loads = Loads()
    models = ("all-MiniLM-L6-v2", ONE)
    limit = model_weight_bytes(catalog.require(models[0]), chosen(folder), CPU) + 1
    values = {"models": models, "device_memory_bytes": limit}
    async with serving(folder, loads, **values) as engine:
        await embed(engine.embedder(models[0]), "hello " * 300, truncate=True)
        full = held_bytes(CPU)
        await embed(engine.embedder(ONE), "hello")
        assert loads.networks[models[0]]() is None
        assert full - held_bytes(CPU) > limit * 0.7


async def test_a_pass_that_nobody_waits_for_ends_before_its_model_leaves(folder: Path) -> None:
    gate = Gate()
    loads = Loads(hooks={ONE: gate})
    async with serving(folder, loads, room=1) as engine:
        using = asyncio.ensure_future(embed(engine.embedder(ONE), "hello"))
        await gate.reached()
        using.cancel()
        other = asyncio.ensure_future(embed(engine.embedder(TWO), "hello"))
        await asyncio.sleep(0.2)
        assert loads.names == [ONE]
        gate.open()
        await other
        assert loads.networks[ONE]() is None


async def test_a_model_that_nothing_uses_is_unloaded_in_time(folder: Path) -> None:
    loads = Loads()
    async with serving(folder, loads, model_idle_seconds=0.3) as engine:
        for _ in range(3):
            await embed(engine.embedder(ONE), "hello")
        await until(lambda: resident(ONE) == 0)
        await embed(engine.embedder(ONE), "hello")
        assert loads.names == [ONE, ONE]


@pytest.mark.parametrize("mode", ["lazy", "eager"])
async def test_a_model_larger_than_the_budget_is_refused_at_the_start(folder: Path, mode: str) -> None:
    with pytest.raises(EngineStartError) as refused:
        async with serving(folder, room=0.9, model_residency=mode):
            pass
    assert "GiB for weights in float32, and SF_DEVICE_MEMORY_BYTES allows 0.00 GiB" in str(refused.value)


async def test_models_that_are_to_stay_must_fit_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    with pytest.raises(EngineStartError) as refused:
        async with serving(folder, loads, room=2.5, model_residency="eager"):
            pass
    assert all(name in str(refused.value) for name in NAMES)
    assert "SF_MODEL_RESIDENCY=lazy" in str(refused.value)
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(2.5 * size(folder)))
    with pytest.raises(EngineStartError, match="of main memory are free for models"):
        async with serving(folder, loads, model_residency="eager"):
            pass
    assert loads.names == []


async def test_memory_that_others_have_taken_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10.0
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(free * size(folder)))
    monkeypatch.setattr(residency, "_RETRY_SECONDS", 0.05)
    async with serving(folder) as engine:
        await embed(engine.embedder(ONE), "hello")
        free = 0.5
        assert await code(embed(engine.embedder(TWO), "hello")) is ErrorCode.SERVICE_UNAVAILABLE
        assert resident(ONE) == 0
        free = 10.0
        await asyncio.sleep(0.1)
        await embed(engine.embedder(TWO), "hello")


async def code(work: Any) -> ErrorCode:
    with pytest.raises(ServiceError) as refused:
        await work
    if refused.value.code is ErrorCode.SERVICE_UNAVAILABLE:
        assert refused.value.retry_after is not None
        assert refused.value.retry_after >= 1
    return refused.value.code


async def test_weights_may_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_catalog(tmp_path)
    write_weights(tmp_path, ONE)
    async with serving(tmp_path) as engine:
        assert f"calls for {TWO} will get 503" in caplog.text
        assert await code(embed(engine.embedder(TWO), "hello")) is ErrorCode.SERVICE_UNAVAILABLE
        await embed(engine.embedder(ONE), "hello")
        write_weights(tmp_path, TWO)
        assert (await embed(engine.embedder(TWO), "hello")).shape == (1, 32)
        assert engine.healthy


async def test_a_load_that_fails_is_tried_again_after_a_while(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_RETRY_SECONDS", 2.0)
    loads = Loads(errors={TWO: RuntimeError("not today")})
    async with serving(folder, loads, room=1) as engine:
        await embed(engine.embedder(ONE), "hello")
        before = figure("load_failures_total", TWO)
        both = [code(embed(engine.embedder(TWO), "hello")) for _ in range(2)]
        assert set(await asyncio.gather(*both)) == {ErrorCode.SERVICE_UNAVAILABLE}
        assert figure("load_failures_total", TWO) == before + 1
        await embed(engine.embedder(ONE), "hello")
        assert await code(embed(engine.embedder(TWO), "hello")) is ErrorCode.SERVICE_UNAVAILABLE
        assert loads.names == [ONE, TWO, ONE]
        loads.errors.clear()
        await asyncio.sleep(2.0)
        await embed(engine.embedder(TWO), "hello")
        assert engine.healthy


async def test_calls_that_come_first_share_one_load(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    loads = Loads()
    async with serving(folder, loads) as engine:
        found = await asyncio.gather(*(embed(engine.embedder(ONE), *TEXTS) for _ in range(8)))
        for vectors in found:
            np.testing.assert_allclose(vectors, wanted[ONE], atol=1e-6)
        assert loads.names == [ONE]


async def test_one_model_is_loaded_at_a_time(folder: Path) -> None:
    loads = Loads()
    loads.goes_on.clear()
    async with serving(folder, loads) as engine:
        calls = [asyncio.ensure_future(embed(engine.embedder(name), "hello")) for name in NAMES]
        await loads.wait()
        await asyncio.sleep(0.1)
        assert loads.names == [ONE]
        loads.goes_on.set()
        await asyncio.gather(*calls)
        assert loads.names == [*NAMES]


async def test_a_deadline_passes_while_a_model_is_loaded(folder: Path) -> None:
    loads = Loads()
    loads.goes_on.clear()
    async with serving(folder, loads) as engine:
        late = embed(engine.embedder(ONE), "hello", deadline=time.monotonic() + 0.1)
        assert await code(late) is ErrorCode.SERVICE_TIMEOUT
        loads.goes_on.set()
        await embed(engine.embedder(ONE), "hello")
        assert loads.names == [ONE]


async def test_a_call_is_cancelled_while_its_model_is_loaded(folder: Path) -> None:
    loads = Loads()
    loads.goes_on.clear()
    async with serving(folder, loads, room=1) as engine:
        gone = asyncio.ensure_future(embed(engine.embedder(ONE), "hello"))
        await loads.wait()
        never = asyncio.ensure_future(embed(engine.embedder(TWO), "hello"))
        await asyncio.sleep(0.05)
        for each in (gone, never):
            each.cancel()
        await asyncio.gather(gone, never, return_exceptions=True)
        loads.goes_on.set()
        await embed(engine.embedder(ONE), "hello")
        # Nobody waited any more for the second when its turn came; the first is not held by its lost call.
        assert loads.names == [ONE]
        await embed(engine.embedder(THREE), "hello")
        assert loads.names == [ONE, THREE]


async def test_a_call_that_waits_for_room_gives_up(folder: Path) -> None:
    gate = Gate()
    loads = Loads(hooks={ONE: gate})
    async with serving(folder, loads, room=1) as engine:
        using = asyncio.ensure_future(embed(engine.embedder(ONE), "hello"))
        await gate.reached()
        late = embed(engine.embedder(TWO), "hello", deadline=time.monotonic() + 0.1)
        assert await code(late) is ErrorCode.SERVICE_TIMEOUT
        gate.open()
        await using
        await embed(engine.embedder(ONE), "hello")
        assert loads.names == [ONE]


async def test_stopping_refuses_those_that_wait(folder: Path) -> None:
    loads = Loads()
    loads.goes_on.clear()
    async with serving(folder, loads) as engine:
        model = engine.embedder(ONE)
        waiting = asyncio.ensure_future(embed(model, "hello"))
        await loads.wait()
        await asyncio.wait_for(engine.stop(200.0), 100)
        assert await code(waiting) is ErrorCode.SERVICE_UNAVAILABLE
        assert await code(embed(model, "hello")) is ErrorCode.SERVICE_UNAVAILABLE
        loads.goes_on.set()


async def stress(folder: Path, wanted: dict[str, np.ndarray], seconds: float) -> None:
    """Call three models at random with memory for two, some calls with a deadline and some cancelled.

    For so long, and until enough was served and loaded to mean something.
    """
    until = time.monotonic() + seconds
    loads = Loads()
    served = 0
    async with serving(folder, loads, room=2) as engine:

        async def calls(seed: int) -> None:
            nonlocal served
            dice = random.Random(seed)
            while time.monotonic() < until or served < 20 or len(loads.names) < 4:
                name, place = dice.choice(NAMES), dice.randrange(len(TEXTS))
                deadline = time.monotonic() + dice.choice([0.001, 0.02, 60])
                work = asyncio.ensure_future(
                    embed(engine.embedder(name), *TEXTS[: place + 1], deadline=deadline)
                )
                if dice.random() < 0.2:
                    await asyncio.sleep(dice.random() / 50)
                    work.cancel()
                (found,) = await asyncio.gather(work, return_exceptions=True)
                if isinstance(found, ServiceError):
                    assert found.code is ErrorCode.SERVICE_TIMEOUT
                elif not isinstance(found, asyncio.CancelledError):
                    assert isinstance(found, np.ndarray), found
                    np.testing.assert_allclose(found, wanted[name][: place + 1], atol=1e-6)
                    served += 1
                await asyncio.sleep(dice.choice([0, 0, 0.01]))

        await asyncio.gather(*(calls(seed) for seed in range(12)))
        for name in NAMES:
            np.testing.assert_allclose(await embed(engine.embedder(name), *TEXTS), wanted[name], atol=1e-6)
        assert sum(map(resident, NAMES)) == 2


async def test_random_calls_get_right_answers(
    folder: Path, wanted: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_MOMENT_SECONDS", 0.05)
    await stress(folder, wanted, 3.0)


@pytest.mark.soak
async def test_random_calls_get_right_answers_for_long(
    folder: Path, wanted: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_MOMENT_SECONDS", 0.05)
    await stress(folder, wanted, 120.0)

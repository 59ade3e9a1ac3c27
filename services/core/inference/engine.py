"""The engine of a process: loads the models, owns the queue and the workers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar, cast

from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Capability, ModelSpec, RerankMethod
from services.core.content import Opener
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import generation
from services.core.inference.answering import ChatModel
from services.core.inference.device import TorchDevice, available_cores
from services.core.inference.embedding import EmbeddingModel
from services.core.inference.generation import Room
from services.core.inference.jobs import Lane
from services.core.inference.late_interaction import LateInteractionScorer
from services.core.inference.list_scoring import ListScorer
from services.core.inference.loading import Loader, WeightBytes, load_model, model_weight_bytes
from services.core.inference.memory import Budget, held_bytes, total_bytes
from services.core.inference.metrics import watch_device
from services.core.inference.pair_scoring import PairScorer
from services.core.inference.residency import UNUSABLE, Residency
from services.core.inference.runtime import Runtime
from services.core.inference.scheduler import Scheduler
from services.core.inference.scoring import Scorer, VectorScorer
from services.core.inference.slots import AnySlot, Loaded, ModelHandle, Slot
from services.core.inference.submission import NoOpener, Submission
from services.core.inference.tokenizing import TextThreads
from services.core.modeling.cuda.ops import describe
from services.core.modeling.device import choose_device, choose_dtype
from services.core.modeling.families.table import FAMILIES
from services.core.modeling.native.instructions import choose as choose_instructions
from services.core.modeling.types import TOGETHER_TOKENS, Backend, Door, EncodeItem, Generator
from services.core.settings import Settings

_log = logging.getLogger(__name__)

_BATCH_TOKENS = 16384
"""Where neither the operator nor a warm-up says how large a pass should be."""

_CPU_BATCH_TOKENS = 128
"""The grain of the queue, about 8 ms of a core. Four times as much is 8 % faster with short texts, and four
times as long is the wait of a call that comes while all workers are busy."""

_CPU_BACKGROUND_TOKENS = 512
"""Of batch work, for which nobody waits, and which the kernel stops in the middle of a pass."""

_CPU_MIN_TOKENS = 32
"""Below this, one worker with twice the tokens is about as fast as two that share them."""

_CPU_MAX_LENGTH_RATIO = 2.0
"""A short text gains from company, but not from waiting for a long one."""

_SWITCH_INTERVAL = 0.0005
"""Seconds a thread may keep the interpreter while another wants it; the default of 5 ms is the time in
which a worker runs several short batches."""


R = TypeVar("R")

_SCORERS: Mapping[RerankMethod, Callable[[EmbeddingModel], Scorer]] = {
    RerankMethod.COSINE: VectorScorer,
    RerankMethod.LATE_INTERACTION: LateInteractionScorer,
}
"""What makes a scorer of a model of vectors, by the catalogue's method."""


class EngineStartError(Exception):
    """The engine cannot start; the text tells the operator why."""


class Engine:
    """The models of a process behind one queue. Made by ``start``, usable from the loop that started it.

    ``on_failure`` is called once, from another thread, when a worker died; ``healthy`` is False from then on
    and the process should end.
    """

    def __init__(
        self,
        runtime: Runtime,
        device: TorchDevice,
        executor: ThreadPoolExecutor,
        residency: Residency,
        opener: Opener,
        dtype: str,
    ) -> None:
        self.dtype = dtype
        """Type of numbers that networks are asked to compute in, as ``float32``."""
        self._runtime = runtime
        self._device = device
        self._executor = executor
        self._residency = residency
        self._slots: dict[str, AnySlot] = {}
        self._threads = TextThreads(executor, device.text_threads, joins=not device.on_cpu)
        self._opener = opener
        self._specs: dict[str, ModelSpec] = {}
        self._embedders: dict[str, EmbeddingModel] = {}
        self._scorers: dict[str, Scorer] = {}
        self._chats: dict[str, ChatModel] = {}
        self._generations: dict[str, generation.Generation] = {}

    @classmethod
    async def start(
        cls,
        settings: Settings,
        catalog: Catalog,
        *,
        load: Loader = load_model,
        weight_bytes: WeightBytes = model_weight_bytes,
        opener: Opener | None = None,
    ) -> Self:
        """Make ready to serve ``settings.models``, and load them unless that is left to their first calls.

        ``opener`` fetches and decodes media; without one texts are taken only.
        Raises EngineStartError for a model or device that cannot be had, and for models that do not fit.
        Shortens the interpreter's switch interval for the whole process.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        try:
            cores = available_cores(settings.workers, settings.cores)
            device = TorchDevice(choose_device(settings.device), cores)
            specs = catalog.select(settings.models)
            choose_instructions(settings.cpu_instructions)
            dtype = choose_dtype(device.torch, settings.dtype)
        except (CatalogError, ValueError) as error:
            raise EngineStartError(str(error)) from error
        where = device.torch
        if where.type == "cuda":
            _log.info("computing on %s", describe(where))
        budget = Budget(where, dtype, settings.device_memory_bytes, settings.workers)
        residency = Residency(where, budget, idle_seconds=settings.model_idle_seconds)
        runtime = Runtime(
            Scheduler(settings.max_queue_tokens),
            device,
            workers=device.workers,
            background=device.background,
            gathers=not device.on_cpu,
        )
        executor = ThreadPoolExecutor(device.text_threads, "texts", lambda: device.claim_cores(False))
        engine = cls(
            runtime, device, executor, residency, opener or NoOpener(), str(dtype).removeprefix("torch.")
        )
        for spec in specs:
            engine._place(spec, settings, load, weight_bytes)
        runtime.start()
        try:
            lazy = settings.model_residency == "lazy"
            await (residency.check_all() if lazy else residency.load_all())
        except UNUSABLE as error:
            await engine.stop(0.0)
            raise EngineStartError(str(error)) from error
        except BaseException:
            await engine.stop(0.0)
            raise
        watch_device(str(where), lambda: held_bytes(where), lambda: total_bytes(where))
        return engine

    async def stop(self, grace: float) -> None:
        """Refuse new calls, finish those inside for up to ``grace`` seconds, let the models go."""
        self._residency.close()
        await self._runtime.stop(grace)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._threads.close()
        self._residency.drop()
        self._specs.clear()
        self._embedders.clear()
        self._scorers.clear()
        self._chats.clear()
        self._generations.clear()

    @property
    def served(self) -> tuple[ModelSpec, ...]:
        """The models of this process, in memory or not, aliases included."""
        return tuple(self._specs.values())

    @property
    def healthy(self) -> bool:
        """Whether all workers are alive and the engine is not stopping."""
        return self._runtime.healthy

    @property
    def on_failure(self) -> Callable[[], None] | None:
        """What to call, in whatever thread, when a worker has died."""
        return self._runtime.on_failure

    @on_failure.setter
    def on_failure(self, callback: Callable[[], None] | None) -> None:
        self._runtime.on_failure = callback

    def batch_tokens(self, spec: ModelSpec) -> int:
        """Return the most tokens that one pass of a served model has."""
        return self._slots[spec.weights_id].lane.max_tokens

    def embedder(self, model: str) -> EmbeddingModel:
        """Return the embedding model of an id, as the catalogue has it.

        Raises ServiceError INPUT_MODEL_NOT_FOUND, naming those that are served.
        """
        found = self._embedders.get(model)
        if found is None:
            raise _not_found(model, self._embedders)
        return found

    def scorer(self, model: str) -> Scorer:
        """Return what scores documents by a model; ids and errors as for ``embedder``."""
        found = self._scorers.get(model)
        if found is None:
            raise _not_found(model, self._scorers)
        return found

    def chat(self, model: str) -> ChatModel:
        """Return the model that answers of an id; ids and errors as for ``embedder``."""
        found = self._chats.get(model)
        if found is None:
            raise _not_found(model, self._chats)
        return found

    def _place(self, spec: ModelSpec, settings: Settings, load: Loader, weight_bytes: WeightBytes) -> None:
        """Make what serves ``spec``; entries with the same weights share one copy of them."""
        family = FAMILIES.get(spec.family)
        if family is None:
            raise EngineStartError(f"{spec.id} cannot be served: there is no network '{spec.family}' yet.")
        slot = self._slots.get(spec.weights_id)
        if slot is None:
            make = self._answering_slot if family.door is Door.GENERATES else self._slot
            slot = self._slots[spec.weights_id] = make(spec, settings, load, weight_bytes)
            self._residency.add(slot)
        self._specs[spec.id] = spec
        if family.door is Door.GENERATES:
            answers = self._generations[spec.weights_id]
            self._chats[spec.id] = ChatModel(spec, slot, answers, self._runtime, self._threads, self._opener)
            return
        submission: Submission[Any, Any] = Submission(spec, slot, self._runtime, self._threads, self._opener)
        if family.door is Door.SCORES_PAIRS:
            self._scorers[spec.id] = PairScorer(submission)
        elif family.door is Door.SCORES_LISTS:
            self._scorers[spec.id] = ListScorer(submission)
        else:
            self._embeds(spec, EmbeddingModel(submission))

    def _embeds(self, spec: ModelSpec, model: EmbeddingModel) -> None:
        if spec.supports(Capability.EMBED):
            self._embedders[spec.id] = model
        if spec.rerank is not None and (make := _SCORERS.get(spec.rerank)):
            self._scorers[spec.id] = make(model)

    def _slot(self, spec: ModelSpec, settings: Settings, load: Loader, weight_bytes: WeightBytes) -> AnySlot:
        device = self._device.torch
        passes: ModelHandle[Any] = ModelHandle()
        lane = self._lane(spec, passes, settings)

        def bring() -> Loaded[Any, Any]:
            # Batches of other models may be running meanwhile.
            self._device.claim_cores(alone=settings.model_residency == "eager")
            network = cast("Backend[Any]", load(spec, settings, device))
            if settings.max_batch_tokens is None and not self._device.on_cpu:
                lane.max_tokens = lane.min_tokens = network.batch_tokens
            return Loaded(network.forward, network.processor)

        return Slot(
            spec,
            lane,
            passes,
            self._residency,
            weight_bytes=lambda: weight_bytes(spec, settings, device),
            load=bring,
        )

    def _answering_slot(
        self, spec: ModelSpec, settings: Settings, load: Loader, weight_bytes: WeightBytes
    ) -> Slot[Room, Any]:
        """As ``_slot``, of a family that generates: with its weights goes the memory for keys and values."""
        device = self._device.torch
        passes: ModelHandle[Any] = ModelHandle()
        # One step or look is a batch of its own.
        lane: Lane[Any, Any] = Lane(
            spec.id, passes, max_tokens=1, min_tokens=1, weight=max(1.0, spec.parameters)
        )
        self._runtime.add(lane)
        cache = settings.chat_cache_bytes
        self._generations[spec.weights_id] = generation.Generation(
            lane, self._runtime, settings.max_queue_tokens
        )

        def bring() -> Loaded[Room, Any]:
            self._device.claim_cores(alone=settings.model_residency == "eager")
            network = cast(Generator, load(spec, settings, device))
            room = Room.of(network, cache, spec.max_tokens, on_cpu=self._device.on_cpu)
            return Loaded(cast(Any, generation.run), room)

        return Slot(
            spec,
            lane,
            passes,
            self._residency,
            weight_bytes=lambda: weight_bytes(spec, settings, device) + cache,
            load=bring,
        )

    def _lane(
        self, spec: ModelSpec, run: Callable[[Sequence[EncodeItem]], Sequence[R]], settings: Settings
    ) -> Lane[EncodeItem, R]:
        budget = settings.max_batch_tokens or _BATCH_TOKENS
        lane = Lane(spec.id, run, weight=max(1.0, spec.parameters))
        if self._device.on_cpu:
            lane.max_tokens = min(budget, _CPU_BATCH_TOKENS)
            lane.min_tokens = min(budget, _CPU_MIN_TOKENS)
            lane.background_tokens = min(budget, _CPU_BACKGROUND_TOKENS)
            lane.max_length_ratio = _CPU_MAX_LENGTH_RATIO
        else:
            lane.max_tokens = lane.min_tokens = budget
            if spec.adapters:
                lane.mixed_tokens = TOGETHER_TOKENS * (1 + len(set(spec.adapters.values())))
        self._runtime.add(lane)
        return lane


def _not_found(model: str, available: Iterable[str]) -> ServiceError:
    names = ", ".join(sorted(available))
    return ServiceError(ErrorCode.INPUT_MODEL_NOT_FOUND, model=model, available=names)

"""The engine of a process: loads the models, owns the queue and the workers."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch

from services.core.catalog import Catalog, CatalogError, canonical_id
from services.core.catalog.types import Capability, InputType, ModelSpec, RerankMethod
from services.core.catalog.weights import WeightsNotFound, locate
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.device import TorchDevice, available_cores
from services.core.inference.embedding import EmbeddingModel
from services.core.inference.jobs import Lane
from services.core.inference.late_interaction import LateInteractionScorer
from services.core.inference.list_scoring import ListScorer
from services.core.inference.memory import NotEnoughMemoryError, held_bytes, require_room, total_bytes
from services.core.inference.metrics import LOAD_SECONDS, watch_device
from services.core.inference.pair_scoring import PairScorer
from services.core.inference.runtime import Runtime
from services.core.inference.scheduler import Scheduler
from services.core.inference.scoring import Scorer, VectorScorer
from services.core.inference.tokenizing import TextThreads, TokenizeStage
from services.core.modeling.checkpoint import CheckpointError
from services.core.modeling.cross_encoder import CrossEncoder
from services.core.modeling.device import choose_device, choose_dtype
from services.core.modeling.listwise import ListwiseRanker
from services.core.modeling.registry import Network, load_network
from services.core.modeling.types import EncodeItem
from services.core.settings import Settings

_log = logging.getLogger(__name__)

_CPU_BATCH_TOKENS = 128
"""The grain of the queue, about 8 ms of a core. Four times as much is 8 % faster with short texts, and four
times as long is the wait of a call that comes while all workers are busy."""

_CPU_MIN_TOKENS = 32
"""Below this, one worker with twice the tokens is about as fast as two that share them."""

_CPU_STRETCH = 2.0
"""A short text gains from company, but not from waiting for a long one."""

_SWITCH_INTERVAL = 0.0005
"""Seconds a thread may keep the interpreter while another wants it; the default of 5 ms is the time in
which a worker runs several short batches."""


R = TypeVar("R")

Model = EmbeddingModel | PairScorer | ListScorer

_SCORERS: Mapping[RerankMethod, Callable[[EmbeddingModel], Scorer]] = {
    RerankMethod.COSINE: VectorScorer,
    RerankMethod.LATE_INTERACTION: LateInteractionScorer,
}
"""What makes a scorer of a model of vectors, by the catalogue's method."""

Loader = Callable[[ModelSpec, Settings, torch.device], Network]


class EngineStartError(Exception):
    """The engine cannot start; the text tells the operator why."""


class Engine:
    """Models in memory behind one queue. Made by ``start``, usable from the loop that started it.

    ``on_failure`` is called once, from another thread, when a worker died; ``healthy`` is False from then on
    and the process should end.
    """

    def __init__(self, runtime: Runtime, device: TorchDevice, executor: ThreadPoolExecutor) -> None:
        self._runtime = runtime
        self._device = device
        self._executor = executor
        self._threads = TextThreads(executor, device.workers)
        self._models: dict[str, Model] = {}
        self._scorers: dict[str, Scorer] = {}

    @classmethod
    async def start(cls, settings: Settings, catalog: Catalog, *, load: Loader | None = None) -> Self:
        """Load and warm up ``settings.models``, by ``load`` where it is given.

        Raises EngineStartError for a model or device that cannot be had. Shortens the interpreter's switch
        interval for the whole process.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        try:
            cores = available_cores(settings.workers, settings.cores)
            device = TorchDevice(choose_device(settings.device), cores)
            specs = catalog.select(settings.models)
        except (CatalogError, ValueError) as error:
            raise EngineStartError(str(error)) from error
        runtime = Runtime(Scheduler(settings.max_queue_tokens), device, workers=device.workers)
        executor = ThreadPoolExecutor(device.workers, "texts", lambda: device.claim_cores(False))
        engine = cls(runtime, device, executor)
        runtime.start()
        try:
            for spec in specs:
                await engine._serve(spec, settings, load or load_model)
        except BaseException:
            await engine.stop(0.0)
            raise
        where = device.torch
        watch_device(str(where), lambda: held_bytes(where), lambda: total_bytes(where))
        return engine

    async def stop(self, grace: float) -> None:
        """Refuse new calls, finish those inside for up to ``grace`` seconds, let the models go."""
        await self._runtime.stop(grace)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._threads.close()
        self._models.clear()
        self._scorers.clear()

    @property
    def served(self) -> tuple[ModelSpec, ...]:
        """The models of this process, aliases included."""
        return tuple(model.spec for model in self._models.values())

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

    def embedder(self, model: str) -> EmbeddingModel:
        """Return the embedding model of an id, with or without ``jina-ai/`` or ``jinaai/``.

        Raises ServiceError INPUT_MODEL_NOT_FOUND, naming those that are served.
        """
        found = self._models.get(model) or self._models.get(canonical_id(model))
        if not isinstance(found, EmbeddingModel) or not found.spec.supports(Capability.EMBED):
            raise _not_found(model, [spec.id for spec in self.served if spec.supports(Capability.EMBED)])
        return found

    def scorer(self, model: str) -> Scorer:
        """Return what scores documents by a model; names and errors as for ``embedder``."""
        found = self._scorers.get(model) or self._scorers.get(canonical_id(model))
        if found is None:
            raise _not_found(model, self._scorers)
        return found

    async def _serve(self, spec: ModelSpec, settings: Settings, load: Loader) -> None:
        original = self._models.get(spec.weights_id)
        model = original.renamed(spec) if original else await self._loaded(spec, settings, load)
        self._models[spec.id] = model
        if isinstance(model, PairScorer | ListScorer):
            self._scorers[spec.id] = model
        elif spec.rerank is not None and (make := _SCORERS.get(spec.rerank)):
            self._scorers[spec.id] = make(model)

    async def _loaded(self, spec: ModelSpec, settings: Settings, load: Loader) -> Model:
        began = time.monotonic()
        try:
            network = await asyncio.to_thread(load, spec, settings, self._device.torch)
        except (WeightsNotFound, CheckpointError, NotEnoughMemoryError, ValueError) as error:
            raise EngineStartError(str(error)) from error
        model = self._model(spec, network, settings)
        seconds = time.monotonic() - began
        LOAD_SECONDS.labels(spec.id).set(seconds)
        _log.info("%s is ready on %s after %.1f s", spec.id, self._device.torch, seconds)
        return model

    def _model(self, spec: ModelSpec, network: Network, settings: Settings) -> Model:
        if isinstance(network, CrossEncoder):
            pairs = self._lane(spec, network.forward, settings)
            return PairScorer(spec, network.tokenizer, self._threads, pairs, self._runtime)
        if isinstance(network, ListwiseRanker):
            blocks = self._lane(spec, network.forward, settings)
            return ListScorer(spec, network.tokenizer, self._threads, blocks, self._runtime)
        texts = self._lane(spec, network.forward, settings)
        stages = {
            InputType.DOCUMENT: TokenizeStage(network.tokenizer, self._threads),
            InputType.QUERY: TokenizeStage(network.query_tokenizer, self._threads),
        }
        return EmbeddingModel(spec, stages, texts, self._runtime)

    def _lane(
        self, spec: ModelSpec, run: Callable[[Sequence[EncodeItem]], Sequence[R]], settings: Settings
    ) -> Lane[EncodeItem, R]:
        budget = settings.max_batch_tokens
        lane = Lane(spec.id, run, weight=max(1.0, spec.parameters))
        if self._device.on_cpu:
            lane.max_tokens = min(budget, _CPU_BATCH_TOKENS)
            lane.min_tokens = min(budget, _CPU_MIN_TOKENS)
            lane.stretch = _CPU_STRETCH
        else:
            lane.max_tokens = lane.min_tokens = budget
        self._runtime.add(lane)
        return lane


def _not_found(model: str, available: Iterable[str]) -> ServiceError:
    names = ", ".join(sorted(available))
    return ServiceError(ErrorCode.INPUT_MODEL_NOT_FOUND, model=model, available=names)


def load_model(spec: ModelSpec, settings: Settings, device: torch.device) -> Network:
    """Load a model from where its weights are, if there is room for them, and warm it up."""
    dtype = choose_dtype(device, settings.dtype)
    directory = locate(spec, settings)
    require_room(spec, directory, device, dtype)
    network = load_network(spec, directory, device=device, dtype=dtype)
    network.warm_up()
    return network

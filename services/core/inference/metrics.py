"""Metrics of the scheduler, the workers and the device."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from services.core.inference.jobs import AnyLane, Batch

_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8)
_RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)

QUEUE_ITEMS = Gauge("searchfoundation_queue_items", "Items waiting for the device.", ("model",))
QUEUE_TOKENS = Gauge("searchfoundation_queue_tokens", "Tokens waiting for the device.", ("model",))
BATCH_ITEMS = Histogram(
    "searchfoundation_batch_items", "Items of a batch on the device.", ("model",), buckets=_ITEMS
)
BATCH_TOKENS = Histogram(
    "searchfoundation_batch_tokens", "Tokens of a batch on the device.", ("model",), buckets=_TOKENS
)
BATCH_SECONDS = Histogram(
    "searchfoundation_batch_seconds",
    "Time of a batch on the device, retries included.",
    ("model",),
    buckets=_SECONDS,
)
PADDING = Histogram(
    "searchfoundation_batch_padding_ratio",
    "Part of the computed tokens that was padding.",
    ("model",),
    buckets=_RATIOS,
)
SPLITS = Counter(
    "searchfoundation_batch_splits",
    "Failed batches that were tried again in halves.",
    ("model", "reason"),
)
DROPPED = Counter(
    "searchfoundation_dropped_items",
    "Items that left the queue without being run: cancelled, expired, failed with their call, or refused.",
    ("model", "reason"),
)
LOAD_SECONDS = Gauge(
    "searchfoundation_model_load_seconds", "Time to load a model and warm it up.", ("model",)
)
RESIDENT = Gauge("searchfoundation_model_resident", "1 while a model is in memory, else 0.", ("model",))
MODEL_BYTES = Gauge(
    "searchfoundation_model_bytes",
    "Memory that the weights of a model take, 0 while it has none.",
    ("model",),
)
LOADS = Counter("searchfoundation_model_loads", "Times that a model was loaded.", ("model",))
UNLOADS = Counter(
    "searchfoundation_model_unloads", "Times that a model was unloaded to make room or as unused.", ("model",)
)
LOAD_FAILURES = Counter(
    "searchfoundation_model_load_failures", "Times that a model could not be loaded for a call.", ("model",)
)
DEVICE_MEMORY = Gauge(
    "searchfoundation_device_memory_bytes",
    "Memory that the process holds on the device; on a CPU all that is resident of it.",
    ("device",),
)
DEVICE_MEMORY_TOTAL = Gauge(
    "searchfoundation_device_memory_total_bytes",
    "Memory that the device has; on a CPU the machine's or the container's.",
    ("device",),
)


class LaneMetrics:
    """The children of one model, looked up once, and its measured speed."""

    def __init__(self, lane: AnyLane) -> None:
        model = lane.name
        QUEUE_ITEMS.labels(model).set_function(lambda: lane.queued_items)
        QUEUE_TOKENS.labels(model).set_function(lambda: lane.queued_tokens)
        self._items = BATCH_ITEMS.labels(model)
        self._tokens = BATCH_TOKENS.labels(model)
        self._seconds = BATCH_SECONDS.labels(model)
        self._padding = PADDING.labels(model)
        self.seconds_per_token = 0.0

    def ran(self, batch: Batch, seconds: float) -> None:
        """Count one batch."""
        self._items.observe(batch.count)
        self._tokens.observe(batch.tokens)
        self._seconds.observe(seconds)
        computed = batch.count * batch.longest if batch.lane.pads else batch.tokens
        self._padding.observe(1 - batch.tokens / computed)
        pace = seconds / batch.tokens
        self.seconds_per_token += (pace - self.seconds_per_token) * (0.05 if self.seconds_per_token else 1.0)


class EngineMetrics:
    """The workers' observer."""

    def __init__(self) -> None:
        self._lanes: dict[AnyLane, LaneMetrics] = {}

    def add(self, lane: AnyLane) -> None:
        """Begin to count for ``lane``."""
        self._lanes[lane] = LaneMetrics(lane)

    def ran(self, batch: Batch, seconds: float) -> None:
        """Count a batch."""
        self._lanes[batch.lane].ran(batch, seconds)

    def split(self, lane: AnyLane, out_of_memory: bool) -> None:
        """Count a batch that failed and was halved."""
        SPLITS.labels(lane.name, "out_of_memory" if out_of_memory else "error").inc()

    def dropped(self, lane: AnyLane, items: int, reason: str) -> None:
        """Count items that were not run."""
        DROPPED.labels(lane.name, reason).inc(items)

    def backlog_seconds(self, workers: int) -> float:
        """Time to work off what is queued, at the pace of the latest batches."""
        work = sum(lane.queued_tokens * metrics.seconds_per_token for lane, metrics in self._lanes.items())
        return work / workers


FIRST_TOKEN_SECONDS = Histogram(
    "searchfoundation_first_token_seconds",
    "Time from a call to the first token of its answer.",
    ("model",),
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128),
)
NEXT_TOKEN_SECONDS = Histogram(
    "searchfoundation_next_token_seconds",
    "Time between two tokens of an answer.",
    ("model",),
    buckets=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.3, 2.6, 5),
)
GENERATING = Gauge(
    "searchfoundation_generation_running", "Conversations that are being answered.", ("model",)
)
GENERATION_WAITING = Gauge(
    "searchfoundation_generation_waiting", "Conversations that wait for memory.", ("model",)
)
GENERATION_WAITING_TOKENS = Gauge(
    "searchfoundation_generation_waiting_tokens",
    "Tokens of the conversations that wait for memory, those of their longest answers included.",
    ("model",),
)
CACHE_BLOCKS = Gauge("searchfoundation_cache_blocks", "Blocks of keys and values that there are.", ("model",))
CACHE_BLOCKS_USED = Gauge(
    "searchfoundation_cache_blocks_used", "Blocks of keys and values that conversations hold.", ("model",)
)
GENERATION_STEP_SEQUENCES = Histogram(
    "searchfoundation_generation_step_sequences",
    "Conversations that share a step.",
    ("model",),
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
GENERATED_TOKENS = Counter("searchfoundation_generated_tokens", "Tokens of answers.", ("model",))
SHARED_TOKENS = Counter(
    "searchfoundation_shared_prompt_tokens",
    "Tokens of prompts that were in memory already and not computed again.",
    ("model",),
)


class GenerationMetrics:
    """What is told about the answers of one model."""

    def __init__(
        self,
        model: str,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        waiting_tokens: Callable[[], float],
        blocks: Callable[[], float],
        all_blocks: Callable[[], float],
    ) -> None:
        """The functions are asked at each scrape; ``blocks`` counts those in use."""
        GENERATING.labels(model).set_function(running)
        GENERATION_WAITING.labels(model).set_function(waiting)
        GENERATION_WAITING_TOKENS.labels(model).set_function(waiting_tokens)
        # The autoscaler's signals: what waits for memory waits for the device.
        QUEUE_ITEMS.labels(model).set_function(waiting)
        QUEUE_TOKENS.labels(model).set_function(waiting_tokens)
        CACHE_BLOCKS_USED.labels(model).set_function(blocks)
        CACHE_BLOCKS.labels(model).set_function(all_blocks)
        self._first = FIRST_TOKEN_SECONDS.labels(model)
        self._next = NEXT_TOKEN_SECONDS.labels(model)
        self._sequences = GENERATION_STEP_SEQUENCES.labels(model)
        self._tokens = GENERATED_TOKENS.labels(model)
        self._shared = SHARED_TOKENS.labels(model)
        self._refused = DROPPED.labels(model, "refused")

    def token(self, seconds: float, *, first: bool) -> None:
        """Count a token, ``seconds`` after the one before it, or after the call came."""
        (self._first if first else self._next).observe(seconds)
        self._tokens.inc()

    def stepped(self, sequences: int) -> None:
        """Count a step."""
        self._sequences.observe(sequences)

    def shared(self, tokens: int) -> None:
        """Count tokens that were in memory already."""
        self._shared.inc(tokens)

    def refused(self) -> None:
        """Count a conversation that could not even wait."""
        self._refused.inc()


class ResidencyMetrics:
    """What is told about models that come and go."""

    def entered(self, model: str, size: int, seconds: float) -> None:
        """A model was loaded."""
        LOADS.labels(model).inc()
        LOAD_SECONDS.labels(model).set(seconds)
        MODEL_BYTES.labels(model).set(size)
        RESIDENT.labels(model).set(1)

    def left(self, model: str, *, unloaded: bool = False) -> None:
        """A model is not in memory."""
        MODEL_BYTES.labels(model).set(0)
        RESIDENT.labels(model).set(0)
        # Made at the first word of a model, so that every model has each of the series.
        LOADS.labels(model)
        LOAD_FAILURES.labels(model)
        UNLOADS.labels(model).inc(1 if unloaded else 0)

    def failed(self, model: str) -> None:
        """A model could not be loaded."""
        LOAD_FAILURES.labels(model).inc()


def watch_device(name: str, held: Callable[[], float], total: Callable[[], float | None]) -> None:
    """Report the memory of a device at each scrape; ``total`` only where the system tells it."""
    DEVICE_MEMORY.labels(name).set_function(held)
    if total() is not None:
        DEVICE_MEMORY_TOTAL.labels(name).set_function(lambda: total() or 0.0)

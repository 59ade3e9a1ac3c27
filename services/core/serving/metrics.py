"""Metrics of the calls this process answers. Names begin with ``searchfoundation_``.

Counting a call takes a few microseconds: plain integers, changed on the event loop only and read at a scrape.
The metric objects of prometheus_client take a lock and a linear search for each of a call's nine figures,
which adds up to a tenth of what a call may cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TypeAlias

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from services.core.call import Call

CANCELLED = "CANCELLED"
OK = "OK"

_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)

_Labels: TypeAlias = "tuple[str, str, str]"


class _Histogram:
    """Observations by upper bound, the last count for those above all bounds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_BOUNDS, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus counts them, by their ``le`` label."""
        seen = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self.counts[:], strict=True):
            seen += count
            buckets.append((bound, seen))
        return buckets


class _Series:
    """Figures of one capability, method and model."""

    __slots__ = ("codes", "decode", "duration", "fetch", "inference", "queue", "tokenize", "tokens")

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.tokens = 0
        self.duration = _Histogram()
        self.fetch: _Histogram | None = None
        self.decode: _Histogram | None = None
        self.tokenize = _Histogram()
        self.queue = _Histogram()
        self.inference = _Histogram()


class CallMetrics(Collector):
    """Counts calls; ``in_flight`` is those being answered now."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._series: dict[_Labels, _Series] = {}

    def record(
        self, call: Call, seconds: float, *, capability: str, method: str, model: str, code: str
    ) -> None:
        """Count a finished call. Every label must come from a bounded set."""
        series = self._series.get((capability, method, model))
        if series is None:
            series = self._series[capability, method, model] = _Series()
        series.codes[code] = series.codes.get(code, 0) + 1
        series.duration.observe(seconds)
        if code == OK and call.usage_tokens:
            timings = call.timings
            if timings.decode:
                series.fetch, series.decode = series.fetch or _Histogram(), series.decode or _Histogram()
                series.fetch.observe(timings.fetch)
                series.decode.observe(timings.decode)
            series.tokenize.observe(timings.tokenize)
            series.queue.observe(timings.queue)
            series.inference.observe(timings.inference)
            series.tokens += call.usage_tokens

    def collect(self) -> Iterator[Metric]:
        """Render for a scrape; may run in another thread than the counting."""
        requests = CounterMetricFamily(
            "searchfoundation_requests",
            "Calls answered, by error code or OK.",
            labels=("capability", "method", "model", "code"),
        )
        duration = HistogramMetricFamily(
            "searchfoundation_request_duration_seconds",
            "Time from a call's arrival to its answer.",
            labels=("capability", "method", "model"),
        )
        stages = HistogramMetricFamily(
            "searchfoundation_request_stage_seconds",
            "Time a successful call spent being tokenised, queued and computed; of one with media, also "
            "being fetched and decoded.",
            labels=("capability", "method", "model", "stage"),
        )
        tokens = CounterMetricFamily(
            "searchfoundation_tokens",
            "Tokens of successful calls.",
            labels=("capability", "method", "model"),
        )
        for labels, series in list(self._series.items()):
            for code, count in list(series.codes.items()):
                requests.add_metric((*labels, code), count)
            tokens.add_metric(labels, series.tokens)
            duration.add_metric(labels, series.duration.cumulated(), series.duration.total)
            for stage in ("fetch", "decode", "tokenize", "queue", "inference"):
                histogram: _Histogram | None = getattr(series, stage)
                if histogram is not None:
                    stages.add_metric((*labels, stage), histogram.cumulated(), histogram.total)
        yield from (requests, duration, stages, tokens)
        yield GaugeMetricFamily(
            "searchfoundation_requests_in_flight", "Calls being answered now.", value=self.in_flight
        )


CALLS = CallMetrics()
REGISTRY.register(CALLS)

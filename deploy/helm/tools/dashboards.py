"""Generate the chart's Grafana dashboards from the lists of panels below.

python deploy/helm/tools/dashboards.py          # write dashboards/*.json
python deploy/helm/tools/dashboards.py --check  # exit 1 if one is not what this file says
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHART = Path(__file__).resolve().parents[1] / "search-foundation"
FOLDER = CHART / "dashboards"

_POOL = 'namespace="$namespace",pool=~"$pool"'
_GATEWAY = 'namespace="$namespace",pool="gateway"'
_REST = f'{_GATEWAY},envoy_http_conn_manager_prefix=~"rest|grpc"'
_CLUSTER = f'{_GATEWAY},envoy_cluster_name=~"$pool"'
_WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One graph: queries as (expression, legend), the unit as Grafana names it, a line of explanation."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""
    stack: bool = False


def rate(metric: str, labels: str, by: str) -> str:
    """Sum of a counter's rate."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{_WINDOW}]))"


def quantile(q: float, metric: str, labels: str, by: str = "") -> str:
    """Quantile of a histogram."""
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{labels}}}[{_WINDOW}])))"


def quantiles(metric: str, labels: str) -> tuple[tuple[str, str], ...]:
    """The three quantiles one looks at."""
    return tuple((quantile(q, metric, labels), f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99))


def mean(metric: str, labels: str, by: str) -> str:
    """Mean of a histogram."""
    return f"{rate(f'{metric}_sum', labels, by)} / {rate(f'{metric}_count', labels, by)}"


_FAILURES = 'code=~"INTERNAL_ERROR|SERVICE_UNAVAILABLE|SERVICE_TIMEOUT"'

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": (
        "Search Foundation / Overview",
        (
            Panel(
                "Calls by capability",
                ((rate("searchfoundation_requests_total", _POOL, "capability"), "{{capability}}"),),
                "reqps",
                stack=True,
            ),
            Panel(
                "Calls that were not answered, by code",
                ((rate("searchfoundation_requests_total", f'{_POOL},code!="OK"', "code"), "{{code}}"),),
                "reqps",
                stack=True,
            ),
            Panel(
                "Share of failures",
                (
                    (
                        f"{rate('searchfoundation_requests_total', f'{_POOL},{_FAILURES}', 'capability')} / "
                        f"{rate('searchfoundation_requests_total', _POOL, 'capability')}",
                        "{{capability}}",
                    ),
                ),
                "percentunit",
                "Failures of the service itself: internal errors, overload, timeouts; not wrong requests.",
            ),
            Panel("Time to answer", quantiles("searchfoundation_request_duration_seconds", _POOL), "s"),
            Panel(
                "Time to answer, p95 by model",
                (
                    (
                        quantile(0.95, "searchfoundation_request_duration_seconds", _POOL, "model"),
                        "{{model}}",
                    ),
                ),
                "s",
            ),
            Panel(
                "Where the time goes, p95",
                ((quantile(0.95, "searchfoundation_request_stage_seconds", _POOL, "stage"), "{{stage}}"),),
                "s",
                "Fetching and decoding media, tokenising, waiting for the device, and the device itself.",
            ),
            Panel(
                "Tokens by model",
                ((rate("searchfoundation_tokens_total", _POOL, "model"), "{{model}}"),),
                stack=True,
            ),
            Panel(
                "Tokens by tenant",
                ((f"topk(20, {rate('searchfoundation_key_tokens_total', _POOL, 'key_id')})", "{{key_id}}"),),
                about="The twenty keys that use most, by key id.",
                stack=True,
            ),
            Panel(
                "Calls in flight",
                ((f"sum by (pool) (searchfoundation_requests_in_flight{{{_POOL}}})", "{{pool}}"),),
            ),
            Panel(
                "Redis",
                (
                    (f"min by (pool) (searchfoundation_redis_up{{{_POOL}}})", "{{pool}} reaches it"),
                    (
                        rate("searchfoundation_redis_errors_total", _POOL, "pool"),
                        "{{pool}} errors per second",
                    ),
                ),
                about="While Redis cannot be reached each pod keeps limits for itself.",
            ),
        ),
    ),
    "chat": (
        "Search Foundation / Chat",
        (
            Panel("Time to the first token", quantiles("searchfoundation_first_token_seconds", _POOL), "s"),
            Panel("Time between tokens", quantiles("searchfoundation_next_token_seconds", _POOL), "s"),
            Panel(
                "Tokens of answers",
                (
                    (
                        rate("searchfoundation_generated_tokens_total", _POOL, "pool, model"),
                        "{{pool}} {{model}}",
                    ),
                ),
                "cps",
            ),
            Panel(
                "Conversations",
                (
                    (f"sum by (model) (searchfoundation_generation_running{{{_POOL}}})", "{{model}} running"),
                    (f"sum by (model) (searchfoundation_generation_waiting{{{_POOL}}})", "{{model}} waiting"),
                ),
                about="They wait while there is no room for them in the blocks.",
            ),
            Panel(
                "Tokens that wait",
                (
                    (
                        f"sum by (pool, model) (searchfoundation_generation_waiting_tokens{{{_POOL}}})",
                        "{{pool}} {{model}}",
                    ),
                ),
                about="The autoscaler's signal where `signal` is `tokens`.",
            ),
            Panel(
                "Blocks of keys and values in use",
                (
                    (
                        f"sum by (pool, model) (searchfoundation_cache_blocks_used{{{_POOL}}}) / "
                        f"sum by (pool, model) (searchfoundation_cache_blocks{{{_POOL}}})",
                        "{{pool}} {{model}}",
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "Conversations that share a step",
                (
                    (
                        mean("searchfoundation_generation_step_sequences", _POOL, "pool, model"),
                        "{{pool}} {{model}}",
                    ),
                ),
            ),
            Panel(
                "Tokens of prompts that were in memory",
                (
                    (
                        rate("searchfoundation_shared_prompt_tokens_total", _POOL, "pool, model"),
                        "{{pool}} {{model}}",
                    ),
                ),
                "cps",
            ),
        ),
    ),
    "inference": (
        "Search Foundation / Inference",
        (
            Panel(
                "Queued items",
                ((f"sum by (pool, model) (searchfoundation_queue_items{{{_POOL}}})", "{{pool}} {{model}}"),),
                about="The autoscaler's signal.",
            ),
            Panel(
                "Queued tokens",
                ((f"sum by (pool, model) (searchfoundation_queue_tokens{{{_POOL}}})", "{{pool}} {{model}}"),),
            ),
            Panel(
                "Tokens computed per second",
                ((rate("searchfoundation_batch_tokens_sum", _POOL, "model"), "{{model}}"),),
                stack=True,
            ),
            Panel(
                "Batches per second",
                ((rate("searchfoundation_batch_seconds_count", _POOL, "model"), "{{model}}"),),
            ),
            Panel(
                "Items of a batch",
                ((mean("searchfoundation_batch_items", _POOL, "model"), "{{model}}"),),
            ),
            Panel(
                "Tokens of a batch",
                ((mean("searchfoundation_batch_tokens", _POOL, "model"), "{{model}}"),),
            ),
            Panel("Time of a batch", quantiles("searchfoundation_batch_seconds", _POOL), "s"),
            Panel(
                "Padding",
                ((mean("searchfoundation_batch_padding_ratio", _POOL, "model"), "{{model}}"),),
                "percentunit",
                "Part of the computed tokens that was padding.",
            ),
            Panel(
                "Batches tried again in halves",
                ((rate("searchfoundation_batch_splits_total", _POOL, "reason"), "{{reason}}"),),
            ),
            Panel(
                "Items dropped",
                ((rate("searchfoundation_dropped_items_total", _POOL, "reason"), "{{reason}}"),),
                about="Cancelled, expired or failed before the device had them.",
            ),
            Panel(
                "Device memory",
                ((f"searchfoundation_device_memory_bytes{{{_POOL}}}", "{{pod}} {{device}}"),),
                "bytes",
            ),
            Panel(
                "Share of the device's memory",
                (
                    (
                        f"searchfoundation_device_memory_bytes{{{_POOL}}} / "
                        f"searchfoundation_device_memory_total_bytes{{{_POOL}}}",
                        "{{pod}} {{device}}",
                    ),
                ),
                "percentunit",
                "Of a GPU's memory; on a CPU of the pod's limit.",
            ),
            Panel(
                "Weights in memory",
                ((f"sum by (pod, model) (searchfoundation_model_bytes{{{_POOL}}})", "{{pod}} {{model}}"),),
                "bytes",
                "With model_residency lazy models come and go.",
                stack=True,
            ),
            Panel(
                "Models loaded, unloaded, failed to load",
                (
                    (rate("searchfoundation_model_loads_total", _POOL, "model"), "{{model}} loaded"),
                    (rate("searchfoundation_model_unloads_total", _POOL, "model"), "{{model}} unloaded"),
                    (rate("searchfoundation_model_load_failures_total", _POOL, "model"), "{{model}} failed"),
                ),
                about="Models in constant use that push each other out want more memory.",
            ),
            Panel(
                "Time to load a model",
                ((f"max by (model) (searchfoundation_model_load_seconds{{{_POOL}}})", "{{model}}"),),
                "s",
            ),
            Panel("Resident memory", ((f"process_resident_memory_bytes{{{_POOL}}}", "{{pod}}"),), "bytes"),
            Panel(
                "Media in flight",
                (
                    (f"searchfoundation_media_bytes_in_flight{{{_POOL}}}", "{{pod}}"),
                    (f"max (searchfoundation_media_bytes_in_flight_limit{{{_POOL}}})", "limit"),
                ),
                "bytes",
                "Files, pixels and patches that calls hold; at the limit calls wait for each other.",
            ),
            Panel(
                "Media fetched, by outcome",
                ((rate("searchfoundation_media_fetches_total", _POOL, "outcome"), "{{outcome}}"),),
                stack=True,
            ),
            Panel(
                "Time to decode media, p95",
                ((quantile(0.95, "searchfoundation_media_decode_seconds", _POOL, "kind"), "{{kind}}"),),
                "s",
            ),
            Panel(
                "Decoding processes started again",
                (
                    (
                        "sum by (pod) (increase("
                        f"searchfoundation_media_decoders_restarted_total{{{_POOL}}}[1h]))",
                        "{{pod}} in an hour",
                    ),
                ),
                about="Those that broke down on a file, took too long, or were left with their call.",
            ),
        ),
    ),
    "batch": (
        "Search Foundation / Batch",
        (
            Panel(
                "Unfinished jobs",
                ((f"max by (status) (searchfoundation_batch_jobs{{{_POOL}}})", "{{status}}"),),
                about="Of the whole database: every pod tells the same, so the largest is shown.",
                stack=True,
            ),
            Panel(
                "Lines not yet done",
                ((f"max (searchfoundation_batch_backlog_lines{{{_POOL}}})", "lines"),),
                about="The autoscaler's signal. Inputs by URL count once they were read.",
            ),
            Panel(
                "Age of the oldest unfinished job",
                ((f"max (searchfoundation_batch_backlog_age_seconds{{{_POOL}}})", "age"),),
                "s",
            ),
            Panel(
                "Time left at the present pace",
                (
                    (
                        f"max (searchfoundation_batch_backlog_lines{{{_POOL}}}) / "
                        f"sum (rate(searchfoundation_batch_lines_total{{{_POOL}}}[{_WINDOW}]))",
                        "time left",
                    ),
                ),
                "s",
            ),
            Panel(
                "Lines done, by model",
                ((rate("searchfoundation_batch_lines_total", _POOL, "model"), "{{model}}"),),
                stack=True,
            ),
            Panel(
                "Lines done, by outcome",
                ((rate("searchfoundation_batch_lines_total", _POOL, "outcome"), "{{outcome}}"),),
                stack=True,
            ),
            Panel("Time of a chunk", quantiles("searchfoundation_batch_chunk_seconds", _POOL), "s"),
            Panel(
                "Workers taken over",
                ((f"sum (increase(searchfoundation_batch_takeovers_total{{{_POOL}}}[1h]))", "in an hour"),),
                about="Workers that fell silent and whose work others went on with.",
            ),
            Panel(
                "Webhooks",
                ((rate("searchfoundation_batch_webhooks_total", _POOL, "outcome"), "{{outcome}}"),),
            ),
        ),
    ),
    "gateway": (
        "Search Foundation / Gateway",
        (
            Panel(
                "Answers by class",
                (
                    (
                        rate("envoy_http_downstream_rq_xx", _REST, "envoy_response_code_class"),
                        "{{envoy_response_code_class}}xx",
                    ),
                ),
                "reqps",
                stack=True,
            ),
            Panel("Time to answer", quantiles("envoy_http_downstream_rq_time", _REST), "ms"),
            Panel(
                "Calls in flight",
                ((f"sum by (pod) (envoy_http_downstream_rq_active{{{_REST}}})", "{{pod}}"),),
            ),
            Panel(
                "Open connections",
                ((f"sum by (pod) (envoy_http_downstream_cx_active{{{_REST}}})", "{{pod}}"),),
            ),
            Panel(
                "Endpoints",
                (
                    (
                        f"min by (envoy_cluster_name) (envoy_cluster_membership_healthy{{{_CLUSTER}}})",
                        "{{envoy_cluster_name}} healthy",
                    ),
                    (
                        f"max by (envoy_cluster_name) (envoy_cluster_membership_total{{{_CLUSTER}}})",
                        "{{envoy_cluster_name}} all",
                    ),
                ),
                about="As the gateway that sees fewest sees them.",
            ),
            Panel(
                "Calls to pools",
                (
                    (
                        rate("envoy_cluster_upstream_rq_total", _CLUSTER, "envoy_cluster_name"),
                        "{{envoy_cluster_name}}",
                    ),
                ),
                "reqps",
                stack=True,
            ),
            Panel(
                "Retries and refusals",
                (
                    (
                        rate("envoy_cluster_upstream_rq_retry", _CLUSTER, "envoy_cluster_name"),
                        "{{envoy_cluster_name}} sent again",
                    ),
                    (
                        rate("envoy_cluster_upstream_rq_pending_overflow", _CLUSTER, "envoy_cluster_name"),
                        "{{envoy_cluster_name}} refused",
                    ),
                ),
                "reqps",
            ),
            Panel(
                "Endpoints set aside",
                (
                    (
                        f"sum by (envoy_cluster_name) "
                        f"(envoy_cluster_outlier_detection_ejections_active{{{_CLUSTER}}})",
                        "{{envoy_cluster_name}}",
                    ),
                ),
            ),
            Panel(
                "Memory",
                ((f"envoy_server_memory_allocated{{{_GATEWAY}}}", "{{pod}}"),),
                "bytes",
            ),
        ),
    ),
}


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"search-foundation-{name}",
        "title": title,
        "tags": ["search-foundation"],
        "editable": False,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _choice("namespace"), _choice("pool", 'namespace="$namespace",')]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _choice(label: str, within: str = "") -> dict[str, Any]:
    many = bool(within)
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f'label_values(searchfoundation_requests_in_flight{{{within}pool!=""}}, {label})',
        "refresh": 2,
        "multi": many,
        "includeAll": many,
        "current": {"text": "All", "value": "$__all"} if many else {},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(panel.queries)
    ]
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stack:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": 8, "w": 12, "x": number % 2 * 12, "y": number // 2 * 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def outputs() -> dict[Path, str]:
    """What the files must hold, by path."""
    return {FOLDER / f"{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in DASHBOARDS}


def main() -> int:
    """Write the files, or with ``--check`` say which differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    check: bool = parser.parse_args().check
    stale = {p: t for p, t in outputs().items() if not p.exists() or p.read_text(encoding="utf-8") != t}
    for path, text in stale.items():
        if check:
            print(f"{path.name} is stale; run {Path(__file__).name}", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())

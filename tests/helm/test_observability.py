"""Monitors, dashboards and alerts: there when asked for, and about metrics that really exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import promql_parser
import pytest

from tests.helm.chart import CHART, REPOSITORY, container, render
from tests.helm.pods import Cluster, call, fetch, run_batch
from tests.helm.value_sets import SETS, one_pool

ALL = {
    "metrics": {"serviceMonitor": {"enabled": True}},
    "dashboards": {"enabled": True},
    "alerts": {"enabled": True},
    "redis": {"existingSecret": "redis"},
    "mtls": {"enabled": True, "gatewaySecret": "gw", "poolSecret": "pools"},
    "poolDefaults": {"autoscaling": {"enabled": True, "maxReplicas": 1, "fallback": {"replicas": 1}}},
}
# Put on every sample by Prometheus and by the chart's monitors.
ADDED = {"namespace", "service", "pod", "pool", "job", "instance"}
# Written by Prometheus itself for each target.
OF_PROMETHEUS = {"up"}


def _alerts(values: dict[str, Any]) -> list[dict[str, Any]]:
    (group,) = render(values).one("PrometheusRule", "sf-search-foundation")["spec"]["groups"]
    return group["rules"]


def _dashboard_queries() -> list[str]:
    queries: list[str] = []
    for path in sorted((CHART / "dashboards").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        queries += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        for variable in board["templating"]["list"]:
            if match := re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]):
                queries.append(match[1])
    return queries


def _scaler_queries() -> list[str]:
    scaled = [render(SETS["keda"]).one("ScaledObject", "embed")]
    scaled.append(render(SETS["batch-keda"]).one("ScaledObject", "batch"))
    scaled += render(SETS["zero"]).all("ScaledObject")
    triggers = [trigger for one in scaled for trigger in one["spec"]["triggers"]]
    return [trigger["metadata"]["query"] for trigger in triggers if trigger["type"] == "prometheus"]


def _all_queries() -> list[str]:
    return [*_dashboard_queries(), *(rule["expr"] for rule in _alerts(ALL)), *_scaler_queries()]


def _below(node: Any) -> Iterator[Any]:
    for part in ("vector_selector", "expr", "lhs", "rhs", "param"):
        if (below := getattr(node, part, None)) is not None:
            yield below
    yield from getattr(node, "args", None) or ()


def _selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Metric names of a query with the labels it asks them for."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
        return
    for below in _below(node):
        yield from _selectors(below)


def _groupings(node: Any) -> Iterator[tuple[set[str], set[str]]]:
    """Labels that a query groups by, with the names of the metrics below."""
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
        yield set(modifier.labels), {name for name, _ in _selectors(node.expr)}
    for below in _below(node):
        yield from _groupings(below)


def _parse(query: str) -> Any:
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


@pytest.fixture(scope="module")
def exported(cluster: Cluster, key: str) -> dict[str, set[str]]:
    """Every metric name the running pods export, with the labels seen on it."""
    gateway, text_pod = cluster.pods["gateway"][0], cluster.pods["text"][0]
    header = {"Authorization": f"Bearer {key}"}
    for _ in range(8):
        call(
            f"http://{gateway.address}:8080/v1/embeddings",
            {"model": "all-MiniLM-L6-v2", "input": "a"},
            header,
        )
    run_batch(f"http://{gateway.address}:8080", header)
    text = fetch(f"http://{text_pod.address}:9090/metrics")
    text += fetch(f"http://{cluster.pods['batch'][0].address}:9090/metrics")
    text += fetch(f"http://{gateway.address}:9090/stats/prometheus")
    names: dict[str, set[str]] = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE):
        for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            names.setdefault(name + suffix, set())
    for name, labels in re.findall(r"^([a-z_]\w*)\{(.*)\} \S+$", text, re.MULTILINE):
        names.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return names


def test_dashboards_and_alerts_name_only_what_a_running_service_exports(
    exported: dict[str, set[str]],
) -> None:
    parsed = [_parse(query) for query in _all_queries()]
    used = [selector for query in parsed for selector in _selectors(query)]
    assert len({name for name, _ in used}) > 30
    for name, labels in used:
        if name in OF_PROMETHEUS:
            continue
        assert name in exported, f"{name} is exported by nobody"
        # A family without a sample yet has no labels to compare.
        if exported[name]:
            assert labels - ADDED <= exported[name], f"{name} has no label {labels - ADDED - exported[name]}"
    for query in parsed:
        for labels, names in _groupings(query):
            known = set[str]().union(*(exported.get(name, set()) for name in names))
            if known:
                assert labels - ADDED <= known, f"{names} cannot be grouped by {labels - ADDED - known}"


def test_the_comparison_would_notice_a_wrong_name(exported: dict[str, set[str]]) -> None:
    ((name, labels),) = _selectors(_parse('sum(rate(searchfoundation_request_total{modle="x"}[5m]))'))
    assert name not in exported
    assert labels == {"modle"}
    assert "model" in exported["searchfoundation_requests_total"]
    ((labels, names),) = _groupings(_parse("sum by (key) (rate(searchfoundation_requests_total[5m]))"))
    assert labels == {"key"}
    assert names == {"searchfoundation_requests_total"}
    assert not labels & exported["searchfoundation_requests_total"]


def test_queries_are_well_formed() -> None:
    for query in _all_queries():
        assert _parse(query) is not None


def test_everything_that_should_be_seen_is() -> None:
    text = " ".join([*_dashboard_queries(), *(rule["expr"] for rule in _alerts(ALL))])
    for subject in (
        *("queue_items", "request_duration", "requests_total", "tokens_total", "key_tokens_total"),
        *("device_memory_bytes", "device_memory_total_bytes"),
        *("batch_jobs", "batch_backlog_lines", "batch_backlog_age_seconds", "batch_lines_total"),
    ):
        assert re.search(rf"searchfoundation_{subject}(_seconds_bucket)?{{", text), subject
    assert "by (key_id)" in text


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    rules = _alerts(ALL)
    assert len({(rule["alert"], rule["expr"]) for rule in rules}) == len(rules)
    assert len({rule["alert"] for rule in rules}) == 18
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"]) > 20


def test_alerts_follow_the_values() -> None:
    values = SETS["observed"] | {
        "alerts": {"enabled": True, "errorRatio": 0.1, "alertLabels": {"team": "search"}}
    }
    rules = {rule["alert"]: rule for rule in _alerts(values)}
    assert rules["SearchFoundationErrors"]["expr"].endswith("> 0.1")
    assert {rule["labels"]["team"] for rule in rules.values()} == {"search"}
    assert "SearchFoundationRedisGone" not in rules
    assert rules["SearchFoundationDeviceMemory"]["expr"].endswith("> 0.92")
    assert rules["SearchFoundationBatchOld"]["expr"].endswith("> 43200")
    assert 'service=~"sf-search-foundation-(batch)"' in rules["SearchFoundationBatchStuck"]["expr"]
    without = {rule["alert"] for rule in _alerts({"alerts": {"enabled": True}, **one_pool()})}
    assert not [name for name in without if "Batch" in name]
    assert 'service=~"sf-search-foundation-(text|classify|batch)"' in rules["SearchFoundationErrors"]["expr"]


def test_every_pod_is_monitored() -> None:
    release = render(SETS["observed"])
    assert release.names("ServiceMonitor") == {"gateway", "text", "classify", "batch"}
    for monitor in release.all("ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = [s for s in release.all("Service") if selector.items() <= s["metadata"]["labels"].items()]
        ports = [p for s in services for p in s["spec"]["ports"] if p["name"] == "metrics"]
        assert len(ports) == 1
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = release.one("ServiceMonitor", "gateway")["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["interval"]) == ("/stats/prometheus", "15s")
    (endpoint,) = release.one("ServiceMonitor", "text")["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["relabelings"][0]["replacement"] == "text"


def test_scraping_without_the_operator() -> None:
    release = render(SETS["observed"])
    annotations = release.workload("text")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == "9090"
    gateway = release.workload("gateway")["spec"]["template"]["metadata"]["annotations"]
    assert gateway["prometheus.io/path"] == "/stats/prometheus"
    assert "prometheus.io/scrape" not in str(render().manifests)


def test_the_gateways_statistics_have_a_port_and_its_admin_page_has_none() -> None:
    release = render()
    assert release.topology()["metrics"] == {"host": "0.0.0.0", "port": 9090}
    assert release.topology()["admin"]["host"] == "127.0.0.1"
    ports = [port["containerPort"] for port in container(release.pod("gateway"), "envoy")["ports"]]
    assert 9901 not in ports


def test_dashboards_are_found_by_grafana() -> None:
    release = render(SETS["observed"])
    boards = [m for m in release.all("ConfigMap") if m["metadata"]["labels"].get("grafana_dashboard") == "1"]
    assert len(boards) == len(list((CHART / "dashboards").glob("*.json"))) >= 3
    for board in boards:
        assert board["metadata"]["annotations"]["grafana_folder"] == "Search"
        ((name, text),) = board["data"].items()
        assert name.endswith(".json")
        assert json.loads(text)["panels"]


def test_nothing_of_it_without_being_asked() -> None:
    release = render()
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert not release.all(kind)
    assert not [name for name in release.names("ConfigMap") if "dashboard" in name]


def test_dashboards_are_what_their_generator_says() -> None:
    module = _tool()
    for path, text in module.outputs().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run dashboards.py"
    assert {path.name for path in module.outputs()} == {p.name for p in (CHART / "dashboards").iterdir()}


def _tool() -> ModuleType:
    path = REPOSITORY / "deploy" / "helm" / "tools" / "dashboards.py"
    spec = importlib.util.spec_from_file_location("dashboards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

"""Who may talk to whom."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.chart import Release, render
from tests.helm.value_sets import SETS, one_pool, pool


def _policy(release: Release, name: str) -> dict[str, Any]:
    return release.one("NetworkPolicy", name)["spec"]


def _ports(rule: dict[str, Any]) -> list[Any]:
    return [port["port"] for port in rule["ports"]]


def _egress_ports(release: Release, name: str) -> set[Any]:
    return {port for rule in _policy(release, name)["egress"] for port in _ports(rule)}


def _component(peer: dict[str, Any]) -> str:
    return peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]


def test_only_the_gateway_reaches_a_pool() -> None:
    grpc, metrics = _policy(render(SETS["one-pool"]), "embed")["ingress"]
    assert _ports(grpc) == ["grpc"]
    assert [_component(peer) for peer in grpc["from"]] == ["gateway"]
    assert _ports(metrics) == ["metrics"]


def test_named_callers_are_let_in() -> None:
    release = render(SETS["named-callers"])
    grpc = _policy(release, "text")["ingress"][0]
    assert {"podSelector": {"matchLabels": {"app": "indexer"}}} in grpc["from"]
    public = _policy(release, "gateway")["ingress"][0]
    assert len(public["from"]) == 2
    assert _component(public["from"][1]) == "test"


def test_the_gateway_is_open_to_callers_and_reaches_only_pools() -> None:
    policy = _policy(render(), "gateway")
    assert "from" not in policy["ingress"][0]
    assert _ports(policy["ingress"][0]) == ["http", "grpc"]
    dns, pools = policy["egress"]
    assert _ports(dns) == [53, 53, 5353, 5353]
    assert [_component(peer) for peer in pools["to"]] == ["pool"]
    assert _ports(pools) == [50051]


def test_metrics_may_be_kept_to_their_readers() -> None:
    reader = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    release = render({"networkPolicy": {"metricsReaders": [reader]}})
    for name in ("gateway", "text"):
        assert _policy(release, name)["ingress"][-1]["from"] == [reader]


def test_a_pool_that_fetches_nothing_gets_out_to_dns_only() -> None:
    assert _egress_ports(render(SETS["no-prefetch"]), "embed") == {53, 5353}
    assert _egress_ports(render(SETS["cache-claim"]), "embed") == {53, 5353}


def test_a_pool_that_fetches_reaches_the_internet_but_not_the_site() -> None:
    rules = _policy(render(SETS["one-pool"]), "embed")["egress"]
    (internet,) = [rule for rule in rules if "to" in rule]
    assert _ports(internet) == [443]
    four, six = (peer["ipBlock"] for peer in internet["to"])
    assert four["cidr"] == "0.0.0.0/0"
    assert {"10.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16"} <= set(four["except"])
    assert six == {"cidr": "::/0", "except": ["fc00::/7", "fe80::/10"]}


def test_a_mirror_of_the_hub_replaces_the_internet() -> None:
    assert _egress_ports(render(SETS["hub-mirror"]), "embed") == {53, 5353, 8443}
    plain = one_pool(prefetch={"hubEndpoint": "http://hub.site.internal"})
    assert _egress_ports(render(plain), "embed") == {53, 5353, 80}


def test_batch_pools_fetch_input_and_call_webhooks() -> None:
    values = one_pool(capability="batch", prefetch={"enabled": False})
    assert _egress_ports(render(values), "embed") == {53, 5353, 80, 443}


def test_stores_outside_the_release_are_reachable_by_port() -> None:
    values: dict[str, Any] = SETS["stores"] | one_pool(prefetch={"enabled": False})
    assert _egress_ports(render(values), "embed") == {53, 5353, 5432, 6379}
    values["networkPolicy"] = {"storePorts": [6432]}
    assert _egress_ports(render(values), "embed") == {53, 5353, 6432}


def test_stores_of_the_release_are_reachable_by_pools_only() -> None:
    release = render(SETS["evaluation-stores"] | one_pool(prefetch={"enabled": False}))
    assert _egress_ports(release, "embed") == {53, 5353, 5432, 6379}
    for store in ("redis", "postgresql"):
        policy = _policy(release, store)
        (rule,) = policy["ingress"]
        assert _ports(rule) == [store]
        assert [_component(peer) for peer in rule["from"]] == ["pool"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert "egress" not in policy


def test_traces_reach_their_collector() -> None:
    values = one_pool(prefetch={"enabled": False}, settings={"otlp_endpoint": "http://otel.site:4317"})
    assert _egress_ports(render(values), "embed") == {53, 5353, 4317}


@pytest.mark.parametrize("endpoint", ["otel.site:4317", "http://otel.site", "https://otel.site/v1"])
def test_a_collector_has_its_own_port_unless_told_otherwise(endpoint: str) -> None:
    values = one_pool(prefetch={"enabled": False}, settings={"otlp_endpoint": endpoint})
    assert _egress_ports(render(values), "embed") == {53, 5353, 4317}


def test_networks_that_callers_urls_may_lead_to_are_open() -> None:
    def networks(capability: str) -> set[str]:
        settings = {"fetch_allow_networks": ["10.20.0.0/16"]}
        release = render(one_pool(capability=capability, settings=settings))
        rules = _policy(release, "embed")["egress"]
        return {
            peer["ipBlock"]["cidr"]
            for rule in rules
            for peer in rule.get("to", [])
            if "ipBlock" in peer and not peer["ipBlock"]["cidr"].endswith("/0")
        }

    assert networks("batch") == {"10.20.0.0/16"}
    assert networks("embed") == set()


def test_a_clouds_identity_can_be_asked_for_where_the_bucket_needs_it() -> None:
    def servers(values: dict[str, Any]) -> list[str]:
        rules = _policy(render(values), "batch")["egress"]
        found = [rule for rule in rules if 988 in _ports(rule)]
        return [peer["ipBlock"]["cidr"] for rule in found for peer in rule["to"]]

    assert "169.254.169.254/32" in servers(SETS["batch-keda"])
    assert servers(SETS["batch-workers"]) == [], "its Secret holds the credentials"
    none = SETS["batch-keda"] | {"networkPolicy": {"metadataServers": []}}
    assert servers(none) == []


def test_further_rules_are_passed_on() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"port": 9000}]}
    release = render(one_pool(prefetch={"enabled": False}) | {"networkPolicy": {"extraPoolEgress": [rule]}})
    assert rule in _policy(release, "embed")["egress"]


def test_policies_can_be_left_to_the_site() -> None:
    assert not render(SETS["open-network"]).all("NetworkPolicy")


def test_every_pod_of_the_release_is_covered() -> None:
    release = render({"pools": [pool("a"), pool("b", capability="batch")], **SETS["evaluation-stores"]})
    assert release.names("NetworkPolicy") == {"gateway", "a", "b", "redis", "postgresql"}
    for name in release.names("NetworkPolicy"):
        assert set(_policy(release, name)["policyTypes"]) == {"Ingress", "Egress"}


def test_the_account_has_no_token() -> None:
    release = render({"serviceAccount": {"annotations": {"iam/role": "batch"}}})
    account = release.one("ServiceAccount", "sf-search-foundation")
    assert account["automountServiceAccountToken"] is False
    assert account["metadata"]["annotations"] == {"iam/role": "batch"}
    own = render({"serviceAccount": {"create": False, "name": "mine"}})
    assert not own.all("ServiceAccount")
    assert own.pod("text")["serviceAccountName"] == "mine"

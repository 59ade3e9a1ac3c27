"""The gateway: its topology, its Services, TLS, and the ways in from outside."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from services.core.settings import Settings
from tests.helm.chart import container, render
from tests.helm.value_sets import ISSUER, SETS, one_pool, pool

FULL = "sf-search-foundation"
HOST = "search.svc.cluster.local"


def test_the_topology_is_the_list_of_pools() -> None:
    topology = render(SETS["two-models"]).topology()
    assert topology["pools"] == [
        {
            "name": "small",
            "capabilities": ["embed"],
            "models": ["all-MiniLM-L6-v2"],
            "addresses": [f"{FULL}-small.{HOST}:50051"],
            "weight": 100,
        },
        {
            "name": "large",
            "capabilities": ["embed"],
            "models": ["jina-embeddings-v3", "jina-embeddings-v2-base-en"],
            "addresses": [f"{FULL}-large.{HOST}:50051"],
            "weight": 100,
        },
    ]


def test_it_listens_for_rest_and_for_grpc() -> None:
    topology = render().topology()
    assert topology["listener"] == {"host": "0.0.0.0", "port": 8080}
    assert topology["grpc_listener"] == {"host": "0.0.0.0", "port": 50051}
    assert topology["admin"] == {"host": "127.0.0.1", "port": 9901}
    assert "grpc_listener" not in render(SETS["no-grpc"]).topology()
    assert render(SETS["ipv6"]).topology()["listener"]["host"] == "::"
    assert render(SETS["ipv6"]).environment("text")["SF_HOST"] == "::"


def test_health_checks_are_as_patient_as_readiness_probes() -> None:
    assert render().topology()["health_check"] == {"timeout": 3, "unhealthy_after": 2, "active": True}
    slow = {"readiness": {"timeoutSeconds": 5, "failureThreshold": 4}}
    values = {"pools": [pool("a", probes=slow), pool("b", models=["jina-embeddings-v3"])]}
    assert render(values).topology()["health_check"] == {"timeout": 5, "unhealthy_after": 4, "active": True}
    own = values | {"gateway": {"topology": {"health_check": {"timeout": 0.5}}}}
    assert render(own).topology()["health_check"] == {"timeout": 0.5, "unhealthy_after": 4, "active": True}


def test_limits_of_the_services_are_those_of_the_gateway() -> None:
    topology = render({"settings": {"max_body_bytes": 1 << 20, "request_timeout_seconds": 5}}).topology()
    assert topology["limits"]["max_body_bytes"] == 1 << 20
    assert topology["timeouts"] == {"request": 5}


def test_the_gateway_lets_through_what_one_of_the_pools_takes() -> None:
    def gateway(*settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        models = ("all-MiniLM-L6-v2", "jina-embeddings-v3")
        pools = [pool(f"p{i}", models=[models[i]], settings=own) for i, own in enumerate(settings)]
        release = render({"pools": pools})
        entries = container(release.pod("gateway"), "render")["env"]
        return release.topology(), {entry["name"]: entry["value"] for entry in entries}

    topology, environment = gateway({"request_timeout_seconds": 300, "max_items": 9000}, {})
    assert topology["timeouts"] == {"request": 300}
    assert environment["SF_MAX_ITEMS"] == "9000"
    assert "max_body_bytes" not in topology["limits"]
    topology, environment = gateway({"max_body_bytes": 1000, "max_documents": 10}, {"max_body_bytes": 2000})
    assert topology["limits"]["max_body_bytes"] == 2000
    assert environment["SF_MAX_DOCUMENTS"] == "2048", "the other pool takes as many as it comes with"
    topology, environment = gateway({"max_body_bytes": 1000}, {})
    assert topology["limits"]["max_body_bytes"] == 64 << 20


def test_defaults_that_the_chart_compares_with_are_those_of_the_services() -> None:
    defaults = {
        name: Settings.model_fields[name].default
        for name in (
            *("max_items", "max_documents", "max_classify_items"),
            *("max_body_bytes", "max_text_body_bytes", "request_timeout_seconds"),
        )
    }
    values = {"pools": [pool("a", settings=dict.fromkeys(defaults, 1)), pool("b", models=["m"])]}
    release = render(values)
    entries = container(release.pod("gateway"), "render")["env"]
    environment = {entry["name"]: entry["value"] for entry in entries}
    for name in ("max_items", "max_documents", "max_classify_items"):
        assert int(environment[f"SF_{name.upper()}"]) == defaults[name]
    for name in ("max_body_bytes", "max_text_body_bytes"):
        assert release.topology()["limits"][name] == defaults[name]
    assert release.topology()["timeouts"]["request"] == defaults["request_timeout_seconds"]


def test_aliases_of_every_pool_reach_the_gateway() -> None:
    release = render(SETS["aliases"] | {"settings": {"model_aliases": {"all": "jina-embeddings-v3"}}})
    catalog = yaml.safe_load(release.one("ConfigMap", "gateway")["data"]["catalog.yaml"])
    assert catalog == {"aliases": {"all": "jina-embeddings-v3", "company-embedder": "all-MiniLM-L6-v2"}}


def test_the_grpc_service_has_the_same_choices_as_the_rest_one() -> None:
    service = render(SETS["load-balancer"]).one("Service", "grpc")["spec"]
    assert service["type"] == "LoadBalancer"
    assert service["loadBalancerClass"] == "internal"
    assert service["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
    assert service["externalTrafficPolicy"] == "Local"
    assert service["ports"][0]["nodePort"] == 30051


def test_envoy_sheds_load_before_its_memory_limit() -> None:
    def heap(limit: Any) -> int:
        values = {"gateway": {"resources": {"limits": {"memory": limit}}}}
        return render(values).topology()["limits"]["max_heap_bytes"]

    assert heap("1Gi") == int(0.85 * (1 << 30))
    assert heap("512Mi") == int(0.85 * (512 << 20))
    assert heap("2G") == 1_700_000_000
    assert heap(1_000_000_000) == 850_000_000


def test_further_topology_is_laid_over_what_the_pools_give() -> None:
    values = {"gateway": {"topology": {"trusted_proxies": 1, "cors": {"origins": ["https://a.example"]}}}}
    topology = render(values).topology()
    assert topology["trusted_proxies"] == 1
    assert topology["cors"] == {"origins": ["https://a.example"]}
    assert len(topology["pools"]) == 3


def test_files_are_written_before_envoy_starts_and_followed_beside_it() -> None:
    pod = render().pod("gateway")
    init, envoy, follow = (container(pod, name) for name in ("render", "envoy", "follow"))
    assert init["image"] == envoy["image"] == follow["image"] == "search-foundation:0.1.0"
    assert follow["args"] == [*init["args"], "--watch"]
    assert follow["env"] == init["env"]
    for writer in (init, follow):
        mounts = {m["name"]: m for m in writer["volumeMounts"]}
        # One file of a ConfigMap under subPath would never change.
        assert mounts["topology"] == {
            "name": "topology",
            "mountPath": "/etc/search-foundation/gateway",
            "readOnly": True,
        }
        assert "readOnly" not in mounts["run"]
    (read,) = [m for m in envoy["volumeMounts"] if m["name"] == "run"]
    assert read == {"name": "run", "mountPath": "/run/search-foundation", "readOnly": True}


def _templates(values: dict[str, Any]) -> dict[str, Any]:
    """Pod template of every workload."""
    release = render(values)
    return {
        workload["metadata"]["name"].removeprefix("sf-search-foundation-"): workload["spec"]["template"]
        for kind in ("Deployment", "StatefulSet")
        for workload in release.all(kind)
    }


@pytest.mark.parametrize(
    ("change", "restarted"),
    [
        (
            {
                "pools": [
                    pool("a", models=["all-MiniLM-L6-v2", "jina-embeddings-v3"]),
                    pool("b", models=["m"]),
                ]
            },
            {"a"},
        ),
        ({"pools": [pool("a"), pool("b", models=["m"]), pool("c", models=["n"])]}, set()),
        ({"pools": [pool("a"), pool("b", models=["m"], settings={"model_aliases": {"own": "m"}})]}, {"b"}),
        ({"catalog": {"aliases": {"own": "all-MiniLM-L6-v2"}}}, {"a", "b"}),
        ({"gateway": {"topology": {"cors": {"origins": []}, "timeouts": {"idle": 10}}}}, set()),
        ({"gateway": {"topology": {"limits": {"max_connections": 9}}}}, {"gateway"}),
    ],
    ids=["model", "pool", "alias", "catalog", "topology", "bootstrap"],
)
def test_a_change_restarts_only_the_pods_it_concerns(change: dict[str, Any], restarted: set[str]) -> None:
    """A gateway takes up pools, models, aliases and most of the topology from files it watches."""
    values = {"pools": [pool("a"), pool("b", models=["m"])]}
    before, after = _templates(values), _templates(values | change)
    assert {name for name in before if before[name] != after[name]} == restarted


def test_endpoints_by_the_api_server_need_an_account_of_their_own() -> None:
    release = render(SETS["slices"])
    (pool, *_) = release.topology()["pools"]
    assert pool["service"] == f"{FULL}-text:50051"
    assert pool["server_name"] == f"{FULL}-text.{HOST}"
    assert release.topology()["health_check"]["active"] is False
    gateway = release.pod("gateway")
    assert gateway["serviceAccountName"] == release.one("Role", "gateway")["metadata"]["name"]
    assert release.pod("text")["serviceAccountName"] == "sf-search-foundation"
    with_token = {
        one["name"]
        for one in [*gateway["initContainers"], *gateway["containers"]]
        if "account" in [mount["name"] for mount in one["volumeMounts"]]
    }
    assert with_token == {"render", "follow"}, "Envoy, which callers reach, has no token"
    assert release.one("RoleBinding", "gateway")["roleRef"]["name"] == f"{FULL}-gateway"
    assert not render().all("Role")


def test_two_gateways_that_are_replaced_one_by_one() -> None:
    spec = render().workload("gateway")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_gateways_health_depends_on_no_pool() -> None:
    envoy = container(render().pod("gateway"), "envoy")
    for probe in ("startupProbe", "readinessProbe"):
        assert envoy[probe]["httpGet"] == {"path": "/live", "port": "http", "scheme": "HTTP"}
    # The other port may be full of callers; this one is not.
    assert envoy["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}


def test_rest_and_grpc_have_services_of_their_own() -> None:
    release = render()
    rest, grpc = release.one("Service", "gateway")["spec"], release.one("Service", "grpc")["spec"]
    assert [(p["name"], p["port"], p["targetPort"]) for p in rest["ports"]] == [("http", 80, "http")]
    assert [(p["name"], p["port"], p["targetPort"]) for p in grpc["ports"]] == [("grpc", 50051, "grpc")]
    assert grpc["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    assert rest["type"] == grpc["type"] == "ClusterIP"
    assert rest["selector"] == grpc["selector"]


def test_without_grpc_there_is_no_port_for_it() -> None:
    release = render(SETS["no-grpc"])
    assert "grpc" not in release.names("Service")
    assert [p["name"] for p in container(release.pod("gateway"), "envoy")["ports"]] == ["http", "metrics"]


def test_service_types() -> None:
    balancer = render(SETS["load-balancer"])
    spec = balancer.one("Service", "gateway")["spec"]
    assert spec["type"] == "LoadBalancer"
    assert spec["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert spec["externalTrafficPolicy"] == "Cluster"
    assert spec["ports"][0]["port"] == 8443
    assert balancer.one("Service", "grpc")["spec"]["type"] == "LoadBalancer"
    node = render(SETS["node-port"]).one("Service", "gateway")["spec"]
    assert (node["type"], node["ports"][0]["nodePort"]) == ("NodePort", 30080)
    assert "externalTrafficPolicy" not in render().one("Service", "gateway")["spec"]


def test_metrics_never_leave_the_cluster() -> None:
    release = render(SETS["load-balancer"])
    metrics = release.one("Service", "gateway-metrics")["spec"]
    assert metrics["clusterIP"] == "None"
    assert "metrics" not in [p["name"] for p in release.one("Service", "gateway")["spec"]["ports"]]


def test_tls_from_a_secret() -> None:
    release = render(SETS["tls-secret"])
    topology = release.topology()
    files = {
        "certificate": "/etc/search-foundation/tls/tls.crt",
        "private_key": "/etc/search-foundation/tls/tls.key",
    }
    assert topology["listener"]["tls"] == files
    assert topology["grpc_listener"]["tls"] == files
    (volume,) = [v for v in release.pod("gateway")["volumes"] if v["name"] == "tls"]
    assert volume["secret"] == {"secretName": "site-tls"}
    (port,) = release.one("Service", "gateway")["spec"]["ports"]
    assert (port["name"], port["port"], port["appProtocol"]) == ("https", 443, "https")
    assert container(release.pod("gateway"), "envoy")["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert not release.all("Certificate")


def test_tls_from_cert_manager() -> None:
    release = render(SETS["tls-cert-manager"])
    certificate = release.one("Certificate", "gateway")["spec"]
    assert certificate["issuerRef"] == ISSUER
    assert certificate["usages"] == ["server auth"]
    assert {"search.example.com", f"{FULL}-gateway.{HOST}", f"{FULL}-grpc.search.svc"} <= set(
        certificate["dnsNames"]
    )
    (volume,) = [v for v in release.pod("gateway")["volumes"] if v["name"] == "tls"]
    assert volume["secret"]["secretName"] == certificate["secretName"]


def test_mtls_between_gateway_and_pools() -> None:
    release = render(SETS["mtls-secrets"])
    assert release.topology()["services_tls"] == {
        "ca": "/etc/search-foundation/mtls/ca.crt",
        "certificate": "/etc/search-foundation/mtls/tls.crt",
        "private_key": "/etc/search-foundation/mtls/tls.key",
    }
    environment = release.environment("text")
    assert environment["SF_TLS_CERT"] == "/etc/search-foundation/tls/tls.crt"
    assert environment["SF_TLS_KEY"] == "/etc/search-foundation/tls/tls.key"
    assert environment["SF_TLS_CLIENT_CA"] == "/etc/search-foundation/tls/ca.crt"
    secrets = {
        workload: [v["secret"]["secretName"] for v in release.pod(workload)["volumes"] if "tls" in v["name"]]
        for workload in ("gateway", "text")
    }
    assert secrets == {"gateway": ["gw"], "text": ["pools"]}
    assert "SF_TLS_CERT" not in render().environment("text")
    assert "services_tls" not in render().topology()


def test_mtls_by_an_authority_of_the_releases_own() -> None:
    release = render(SETS["mtls-own-authority"])
    assert release.names("Issuer") == {"self-signed", "ca"}
    assert release.names("Certificate") == {"ca", "gateway-mtls", "pool-mtls"}
    assert release.one("Certificate", "ca")["spec"]["isCA"] is True
    pools = release.one("Certificate", "pool-mtls")["spec"]
    assert pools["dnsNames"] == [f"{FULL}-{name}.{HOST}" for name in ("text", "classify", "batch")]
    assert pools["usages"] == ["server auth"]
    assert pools["issuerRef"] == {"name": f"{FULL}-ca", "kind": "Issuer"}
    assert release.one("Certificate", "gateway-mtls")["spec"]["usages"] == ["client auth"]


def test_mtls_by_the_sites_issuer() -> None:
    release = render(SETS["mtls-issuer"])
    assert not release.all("Issuer")
    assert release.names("Certificate") == {"gateway-mtls", "pool-mtls"}
    assert release.one("Certificate", "pool-mtls")["spec"]["issuerRef"] == ISSUER


def test_an_ingress_to_the_gateway() -> None:
    ingress = render(SETS["ingress"]).one("Ingress", "gateway")["spec"]
    assert ingress["ingressClassName"] == "nginx"
    (rule,) = ingress["rules"]
    assert rule["host"] == "search.example.com"
    (path,) = rule["http"]["paths"]
    assert path["pathType"] == "Prefix"
    assert path["backend"] == {"service": {"name": f"{FULL}-gateway", "port": {"number": 80}}}
    anywhere = render({"gateway": {"ingress": {"enabled": True}}}).one("Ingress", "gateway")["spec"]
    assert "host" not in anywhere["rules"][0]


def test_routes_of_the_gateway_api() -> None:
    release = render(SETS["gateway-api"])
    http, grpc = release.one("HTTPRoute", "gateway")["spec"], release.one("GRPCRoute", "gateway")["spec"]
    assert http["parentRefs"] == [{"name": "edge"}]
    assert http["hostnames"] == ["search.example.com"]
    assert http["rules"][0]["backendRefs"] == [{"name": f"{FULL}-gateway", "port": 80}]
    assert grpc["parentRefs"] == [{"name": "edge", "sectionName": "grpc"}]
    assert grpc["rules"][0]["backendRefs"] == [{"name": f"{FULL}-grpc", "port": 50051}]


def test_a_platforms_gateway_speaks_tls_to_ours() -> None:
    release = render(SETS["gateway-api-tls"])
    policy = release.one("BackendTLSPolicy", "gateway")["spec"]
    assert [target["name"] for target in policy["targetRefs"]] == [f"{FULL}-gateway", f"{FULL}-grpc"]
    assert policy["validation"]["hostname"] == f"{FULL}-gateway.{HOST}"
    assert policy["validation"]["caCertificateRefs"][0]["name"] == "site-ca"
    assert not render(SETS["gateway-api"]).all("BackendTLSPolicy")


def test_nothing_outside_is_touched_by_default() -> None:
    release = render()
    for kind in ("Ingress", "HTTPRoute", "GRPCRoute", "Certificate", "Issuer"):
        assert not release.all(kind)


def test_the_test_pod_calls_the_gateway_with_a_key() -> None:
    release = render()
    pod = release.one("Pod", "test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    entries = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["env"]}
    assert entries["GATEWAY_URL"]["value"] == f"http://{FULL}-gateway.{HOST}:80"
    models = json.loads(entries["MODELS"]["value"])
    assert models == {key: ["all-MiniLM-L6-v2"] for key in ("embed", "rerank", "classify", "batch")}
    assert entries["API_KEY"]["valueFrom"]["secretKeyRef"] == {
        "name": f"{FULL}-bootstrap-key",
        "key": "api-key",
    }


def test_the_test_pod_takes_the_operators_key_or_none() -> None:
    given = render(SETS["keys-secret"]).one("Pod", "test")["spec"]["containers"][0]["env"]
    assert {"name": "test-key", "key": "api-key"} in [
        e.get("valueFrom", {}).get("secretKeyRef") for e in given
    ]
    open_to_all = render(SETS["no-auth"]).one("Pod", "test")["spec"]["containers"][0]["env"]
    assert [e["name"] for e in open_to_all] == ["GATEWAY_URL", "MODELS"]
    assert not render(SETS["keys"]).all("Pod")


def test_the_test_pod_trusts_the_certificates_authority() -> None:
    pod = render(SETS["tls-cert-manager"]).one("Pod", "test")["spec"]
    entries = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert entries["GATEWAY_URL"] == f"https://{FULL}-gateway.{HOST}:443"
    assert entries["CA_FILE"] == "/etc/search-foundation/tls/ca.crt"
    assert pod["volumes"][0]["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_the_test_pod_asks_what_there_is() -> None:
    (entry,) = [
        e
        for e in render(one_pool(capability="rerank")).one("Pod", "test")["spec"]["containers"][0]["env"]
        if e["name"] == "MODELS"
    ]
    assert json.loads(entry["value"]) == {"rerank": ["all-MiniLM-L6-v2"]}


def test_services_of_a_dual_stack_cluster() -> None:
    assert {s["spec"]["ipFamilyPolicy"] for s in render(SETS["dual-stack"]).all("Service")} == {
        "PreferDualStack"
    }
    assert not [s for s in render().all("Service") if "ipFamilyPolicy" in s["spec"]]

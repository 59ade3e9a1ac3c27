"""Wrong values are refused before anything is installed, with a message that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from services.core.settings import TIERS
from tests.helm.chart import refusal, render
from tests.helm.value_sets import DIGEST, ISSUER, one_pool, pool

BATCH = {"capability": "batch", "replicas": 2}
KEDA = {"enabled": True, "minReplicas": 2, "maxReplicas": 4}

# Values, and words the message must hold.
BY_SCHEMA: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown-key": ({"replicas": 3}, ["replicas", "not allowed"]),
    "unknown-pool-key": (one_pool(replica=3), ["pools.0", "replica", "not allowed"]),
    "unknown-nested-key": (one_pool(modelCache={"kind": "pvc"}), ["modelCache", "kind", "not allowed"]),
    "unknown-default": ({"poolDefaults": {"gpus": 1}}, ["poolDefaults", "gpus", "not allowed"]),
    "no-pools": ({"pools": []}, ["pools", "at least 1"]),
    "pool-without-name": (
        {"pools": [{"capability": "embed", "models": ["m"]}]},
        ["pools.0", "name is required"],
    ),
    "pool-without-capability": ({"pools": [{"name": "a", "models": ["m"]}]}, ["capability is required"]),
    "pool-without-models": ({"pools": [{"name": "a", "capability": "embed"}]}, ["models is required"]),
    "empty-models": (one_pool(models=[]), ["pools.0.models", "at least 1"]),
    "model-twice": (one_pool(models=["m", "m"]), ["pools.0.models", "unique"]),
    "unknown-capability": (one_pool(capability="embedding"), ["pools.0.capability", '"embed"', '"batch"']),
    "unknown-capability-in-list": (
        one_pool(capability=["embed", "search"]),
        ["pools.0.capability.1", '"rerank"'],
    ),
    "capability-twice": (one_pool(capability=["embed", "embed"]), ["pools.0.capability", "unique"]),
    "pool-name-in-capitals": (one_pool(name="Embed"), ["pools.0.name", "pattern"]),
    "pool-name-too-long": (one_pool(name="a-name-of-a-pool-beyond-all-measure"), ["pools.0.name", "20"]),
    "zero-replicas": (one_pool(replicas=0), ["pools.0.replicas", "greater than or equal to 1"]),
    "replicas-as-text": (one_pool(replicas="three"), ["pools.0.replicas", "integer"]),
    "unknown-device": (one_pool(device={"type": "tpu"}), ["pools.0.device.type", '"gpu"']),
    "too-many-gpus": (one_pool(device={"type": "gpu", "count": 64}), ["pools.0.device.count", "16"]),
    "memory-in-words": (one_pool(resources={"limits": {"memory": "lots"}}), ["limits.memory", "pattern"]),
    "unknown-setting": ({"settings": {"max_item": 1}}, ["settings", "max_item", "not allowed"]),
    "setting-of-the-chart": (one_pool(settings={"grpc_port": 1}), ["settings", "grpc_port", "not allowed"]),
    "setting-out-of-range": ({"settings": {"max_items": 0}}, ["settings.max_items", "greater than or equal"]),
    "setting-of-wrong-type": ({"settings": {"max_items": "many"}}, ["settings.max_items", "integer"]),
    "unknown-dtype": ({"settings": {"dtype": "int4"}}, ["settings.dtype", '"bfloat16"']),
    "unknown-topology-key": (
        {"gateway": {"topology": {"pool": []}}},
        ["gateway.topology", "pool", "not allowed"],
    ),
    "topology-of-the-chart": ({"gateway": {"topology": {"pools": []}}}, ["gateway.topology", "not allowed"]),
    "topology-out-of-range": (
        {"gateway": {"topology": {"timeouts": {"request": 0}}}},
        ["gateway.topology.timeouts.request", "greater than 0"],
    ),
    "unknown-cache": (one_pool(modelCache={"type": "s3"}), ["modelCache.type", '"pvc"', '"hostPath"']),
    "unknown-access-mode": (one_pool(modelCache={"accessMode": "Shared"}), ["accessMode", '"ReadWriteMany"']),
    "unknown-autoscaler": (one_pool(autoscaling={"provider": "vpa"}), ["autoscaling.provider", '"keda"']),
    "scale-below-zero": (one_pool(autoscaling={"minReplicas": -1}), ["autoscaling.minReplicas", "0"]),
    "queue-depth-zero": (
        one_pool(autoscaling={"queueDepth": 0}),
        ["autoscaling.queueDepth", "greater than 0"],
    ),
    "grace-of-nothing": (one_pool(drain={"graceSeconds": 0}), ["drain.graceSeconds"]),
    "surge-in-words": (one_pool(strategy={"maxSurge": "some"}), ["strategy.maxSurge", "pattern"]),
    "service-type": (
        {"gateway": {"service": {"type": "External"}}},
        ["gateway.service.type", '"LoadBalancer"'],
    ),
    "port-too-high": ({"gateway": {"service": {"port": 70000}}}, ["gateway.service.port", "65535"]),
    "node-port-too-low": ({"gateway": {"service": {"nodePort": 80}}}, ["gateway.service.nodePort", "30000"]),
    "log-level": ({"gateway": {"logLevel": "loud"}}, ["gateway.logLevel", '"warning"']),
    "key-in-clear": (
        {"auth": {"keys": [{"id": "a", "digest": "jina_secret"}]}},
        ["auth.keys.0.digest", "sha256"],
    ),
    "key-without-id": ({"auth": {"keys": [{"digest": DIGEST}]}}, ["auth.keys.0", "id is required"]),
    "object-store-scheme": ({"objectStore": {"url": "https://bucket"}}, ["objectStore.url", "pattern"]),
    "cidr": ({"networkPolicy": {"privateNetworks": ["10.0.0.0"]}}, ["networkPolicy.privateNetworks.0"]),
    "prometheus-address": (
        {"metrics": {"prometheusAddress": "prometheus:9090"}},
        ["metrics.prometheusAddress"],
    ),
    "interval": ({"metrics": {"serviceMonitor": {"interval": "15"}}}, ["metrics.serviceMonitor.interval"]),
    "image-digest": ({"image": {"digest": "abc"}}, ["image.digest", "sha256"]),
    "pull-policy": ({"image": {"pullPolicy": "Sometimes"}}, ["image.pullPolicy", '"IfNotPresent"']),
    "secret-in-settings": ({"settings": {"webhook_secret": "whsec_x"}}, ["webhook_secret", "not allowed"]),
    "backlog-of-nothing": (one_pool(autoscaling={"backlogLines": 0}), ["autoscaling.backlogLines"]),
    "device-memory-ratio": ({"alerts": {"deviceMemoryRatio": 95}}, ["alerts.deviceMemoryRatio", "1"]),
    "metadata-server": ({"networkPolicy": {"metadataServers": ["169.254.169.254"]}}, ["metadataServers.0"]),
    "error-ratio": ({"alerts": {"errorRatio": 5}}, ["alerts.errorRatio", "1"]),
    "auth-as-text": ({"auth": {"enabled": "yes"}}, ["auth.enabled", "boolean"]),
    "host-name": ({"gateway": {"ingress": {"hosts": ["Search_1"]}}}, ["gateway.ingress.hosts.0", "pattern"]),
    "unknown-effect": (
        one_pool(tolerations=[{"key": "gpu", "effect": "NoShedule"}]),
        ["pools.0.tolerations.0.effect", '"NoSchedule"'],
    ),
    "unknown-field-of-affinity": (
        {"poolDefaults": {"affinity": {"podAntiAffinity": {"preferred": []}}}},
        ["affinity.podAntiAffinity", "preferred", "not allowed"],
    ),
    "egress-without-mask": (
        {"networkPolicy": {"extraPoolEgress": [{"to": [{"ipBlock": {"cidr": "10.1.2.3"}}]}]}},
        ["extraPoolEgress.0.to.0.ipBlock.cidr", "pattern"],
    ),
    "unknown-field-of-a-peer": (
        {"networkPolicy": {"gatewayCallers": [{"podSelectors": {}}]}},
        ["gatewayCallers.0", "podSelectors", "not allowed"],
    ),
    "unknown-field-of-a-volume": (
        one_pool(extraVolumes=[{"name": "ca", "configmap": {"name": "site-ca"}}]),
        ["pools.0.extraVolumes.0", "configmap", "not allowed"],
    ),
    "sidecar-with-unknown-field": (
        {"gateway": {"sidecars": [{"name": "proxy", "image": "proxy", "port": 80}]}},
        ["gateway.sidecars.0", "port", "not allowed"],
    ),
    "long-name": ({"fullnameOverride": "x" * 40}, ["fullnameOverride", "30"]),
}

BY_RULE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pool-twice": ({"pools": [pool("a"), pool("a", models=["m"])]}, ["pool 'a'", "used twice"]),
    "reserved-name": ({"pools": [pool("gateway")]}, ["pool 'gateway'", "another part"]),
    "nobody-takes-a-model": (
        {"pools": [pool("a", weight=0), pool("b", weight=0)]},
        ["every pool that serves all-MiniLM-L6-v2 for embed has weight 0"],
    ),
    "least-above-most": (
        one_pool(autoscaling={"enabled": True, "minReplicas": 5, "maxReplicas": 2}),
        ["minReplicas (5) is above maxReplicas (2)"],
    ),
    "autoscaling-without-metrics": (
        one_pool(autoscaling=KEDA),
        ["metrics.serviceMonitor.enabled", "nothing collects"],
    ),
    "zero-without-keda": (
        one_pool(autoscaling={"enabled": True, "minReplicas": 0, "provider": "hpa"}),
        ["pool 'embed'", "only the provider keda"],
    ),
    "batch-to-zero-without-database": (
        one_pool(capability="batch", autoscaling={"enabled": True, "minReplicas": 0, "maxReplicas": 1}),
        ["pool 'embed'", "jobs in PostgreSQL"],
    ),
    "fallback-outside": (
        one_pool(autoscaling=KEDA | {"fallback": {"replicas": 9}}),
        ["fallback.replicas (9)", "between"],
    ),
    "batch-without-database": (one_pool(**BATCH), ["PostgreSQL", "database.existingSecret"]),
    "batch-without-shared-files": (
        one_pool(**BATCH) | {"database": {"existingSecret": "pg"}},
        ["objectStore.url", "existingClaim"],
    ),
    "classify-without-database": (one_pool(capability="classify", replicas=2), ["database.existingSecret"]),
    "product-of-a-cpu": (one_pool(device={"product": "NVIDIA-L40S"}), ["device.product", "cpu"]),
    "host-path-without-path": (one_pool(modelCache={"type": "hostPath"}), ["absolute modelCache.path"]),
    "path-without-host-path": (one_pool(modelCache={"path": "/m"}), ["only for type hostPath or image"]),
    "image-without-a-name": (one_pool(modelCache={"type": "image"}), ["modelCache.image go together"]),
    "shared-by-one-writer": (
        one_pool(modelCache={"type": "pvc", "shared": True})
        | {"poolDefaults": {"modelCache": {"accessMode": "ReadWriteOnce"}}},
        ["poolDefaults.modelCache.accessMode"],
    ),
    "claim-without-pvc": (one_pool(modelCache={"existingClaim": "c"}), ["only for type pvc"]),
    "read-only-and-empty": (one_pool(modelCache={"readOnly": True}), ["a volume that holds the models"]),
    "one-writer-for-many": (
        one_pool(replicas=2, modelCache={"type": "pvc", "accessMode": "ReadWriteOnce"}),
        ["2 pods cannot share", "ReadWriteMany"],
    ),
    "no-way-to-update": (
        one_pool(strategy={"maxSurge": 0, "maxUnavailable": 0}),
        ["maxSurge and maxUnavailable are both 0"],
    ),
    "one-volume-for-two-versions": (
        one_pool(modelCache={"type": "pvc", "accessMode": "ReadWriteOncePod"}),
        ["ReadWriteOncePod", "strategy.maxSurge to 0"],
    ),
    "two-batch-pools-apart": (
        {"pools": [pool("a", capability="batch"), pool("b", capability="batch", models=["m"])]},
        ["pools 'a', 'b' all serve batch", "database.existingSecret", "objectStore.url"],
    ),
    "two-classify-pools-apart": (
        {"pools": [pool("a", capability="classify"), pool("b", capability="classify", models=["m"])]},
        ["pools 'a', 'b' all serve classify", "database.existingSecret"],
    ),
    "alias-of-two-models": (
        {
            "pools": [
                pool("a", settings={"model_aliases": {"x": "all-MiniLM-L6-v2"}}),
                pool(
                    "b",
                    models=["jina-embeddings-v3"],
                    settings={"model_aliases": {"x": "m"}},
                ),
            ]
        },
        ["alias 'x'", "all-MiniLM-L6-v2 in another pool"],
    ),
    "ranges-without-grpc-balancer": (
        {"gateway": {"grpc": {"service": {"loadBalancerSourceRanges": ["192.0.2.0/24"]}}}},
        ["gateway.grpc.service: loadBalancerSourceRanges needs type LoadBalancer"],
    ),
    "drain-beyond-grace": (one_pool(settings={"drain_seconds": 30}), ["drain_seconds", "below"]),
    "tls-without-certificate": ({"gateway": {"tls": {"enabled": True}}}, ["gateway.tls", "neither"]),
    "tls-with-two-certificates": (
        {"gateway": {"tls": {"enabled": True, "existingSecret": "a", "certManager": {"enabled": True}}}},
        ["gateway.tls", "not both"],
    ),
    "tls-without-issuer": (
        {"gateway": {"tls": {"enabled": True, "certManager": {"enabled": True}}}},
        ["issuerRef.name"],
    ),
    "route-to-nowhere": ({"gateway": {"httpRoute": {"enabled": True}}}, ["httpRoute", "parentRefs"]),
    "grpc-route-to-nowhere": ({"gateway": {"grpcRoute": {"enabled": True}}}, ["grpcRoute", "parentRefs"]),
    "grpc-route-without-grpc": (
        {
            "gateway": {
                "grpc": {"enabled": False},
                "grpcRoute": {"enabled": True, "parentRefs": [{"name": "e"}]},
            }
        },
        ["gateway.grpc.enabled"],
    ),
    "tls-behind-a-route": (
        {
            "gateway": {
                "tls": {"enabled": True, "existingSecret": "t"},
                "httpRoute": {"enabled": True, "parentRefs": [{"name": "e"}]},
            }
        },
        ["gateway.tls", "gateway.backendTls"],
    ),
    "tls-behind-an-ingress": (
        {"gateway": {"tls": {"enabled": True, "existingSecret": "t"}, "ingress": {"enabled": True}}},
        ["gateway.tls", "gateway.ingress.annotations"],
    ),
    "node-port-of-cluster-ip": ({"gateway": {"service": {"nodePort": 30080}}}, ["nodePort needs type"]),
    "ranges-without-balancer": (
        {"gateway": {"service": {"loadBalancerSourceRanges": ["192.0.2.0/24"]}}},
        ["loadBalancerSourceRanges needs type LoadBalancer"],
    ),
    "gateway-least-above-most": (
        {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}},
        ["gateway.autoscaling", "above"],
    ),
    "gateway-no-way-to-update": (
        {"gateway": {"strategy": {"maxSurge": "0%"}}},
        ["gateway.strategy", "both 0"],
    ),
    "mtls-without-certificates": (
        {"mtls": {"enabled": True, "gatewaySecret": "a"}},
        ["mtls", "not both set"],
    ),
    "mtls-with-both": (
        {"mtls": {"enabled": True, "poolSecret": "a", "certManager": {"enabled": True, "issuerRef": ISSUER}}},
        ["mtls", "not both"],
    ),
    "two-databases": (
        {"database": {"existingSecret": "a"}, "evaluation": {"postgresql": {"enabled": True}}},
        ["exclude each other"],
    ),
    "two-redis": (
        {"redis": {"existingSecret": "a"}, "evaluation": {"redis": {"enabled": True}}},
        ["exclude each other"],
    ),
    "secret-without-store": ({"objectStore": {"existingSecret": "a"}}, ["objectStore.url is empty"]),
    "keys-twice": (
        {"auth": {"existingSecret": "a", "keys": [{"id": "a", "digest": DIGEST}]}},
        ["existingSecret or keys"],
    ),
    "key-of-unknown-tier": (
        {"auth": {"keys": [{"id": "a", "digest": DIGEST, "tier": "gold"}]}},
        ["'a' has tier 'gold'", "free, tier1, tier2, unlimited"],
    ),
    "balance-without-database": (
        {"auth": {"keys": [{"id": "a", "digest": DIGEST, "balance": 5}]}},
        ["balance of 'a'", "database.existingSecret"],
    ),
    "nobody-could-call": ({"auth": {"bootstrapKey": {"enabled": False}}}, ["nobody could call"]),
}


@pytest.mark.parametrize("case", BY_SCHEMA)
def test_the_schema_refuses(case: str) -> None:
    values, words = BY_SCHEMA[case]
    message = refusal(values)
    assert "don't meet the specifications of the schema" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("case", BY_RULE)
def test_values_that_do_not_fit_together_are_refused(case: str) -> None:
    values, words = BY_RULE[case]
    message = refusal(values)
    assert "The values do not fit together" in message
    for word in words:
        assert word in message


def test_the_chart_knows_the_built_in_tiers() -> None:
    entries = [{"id": name, "digest": f"sha256:{i:064}", "tier": name} for i, name in enumerate(TIERS)]
    assert render({"auth": {"keys": entries}}).one("Secret", "keys")
    own = {"auth": {"keys": [{"id": "a", "digest": DIGEST, "tier": "gold"}]}}
    assert render(own | {"settings": {"tiers": {"gold": {"concurrency": 1}}}}).one("Secret", "keys")


def test_every_problem_is_told_at_once() -> None:
    values = one_pool(**BATCH, device={"product": "x"}) | {"mtls": {"enabled": True}}
    message = refusal(values)
    assert message.count("\n  - ") == 4

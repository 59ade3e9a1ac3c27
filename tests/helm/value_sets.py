"""Sets of values that every general rule is checked against."""

from __future__ import annotations

from typing import Any

from tests.helm.chart import THREE_POOLS

ISSUER = {"name": "site", "kind": "ClusterIssuer"}
DIGEST = "sha256:" + "ab" * 32
KEYS = [
    {"id": "team-a", "digest": DIGEST, "tier": "tier1"},
    {"id": "team-b", "digest": "sha256:" + "cd" * 32},
]


def pool(name: str = "embed", **over: Any) -> dict[str, Any]:
    """A pool of MiniLM that embeds, with ``over`` laid over it."""
    return {"name": name, "capability": "embed", "models": ["all-MiniLM-L6-v2"]} | over


def one_pool(**over: Any) -> dict[str, Any]:
    """Values with one pool named ``embed``."""
    return {"pools": [pool(**over)]}


MONITORED: dict[str, Any] = {"metrics": {"serviceMonitor": {"enabled": True}}}
"""What autoscaling reads."""

SMALL_GATEWAY: dict[str, Any] = {
    "replicas": 1,
    "concurrency": 1,
    "drain": {"preStopSeconds": 1, "graceSeconds": 20},
}


def small(*pools: dict[str, Any], **other: Any) -> dict[str, Any]:
    """Values for a release that runs on a test machine."""
    return {"pools": list(pools), "gateway": SMALL_GATEWAY, **other}


RUNNING = tuple(
    {**default, "replicas": 2 if default["name"] == "text" else 1}
    | {"drain": {"preStopSeconds": 1, "graceSeconds": 20}}
    for default in THREE_POOLS
)
"""Pools of the release that the tests run, the first with two replicas."""

SETS: dict[str, dict[str, Any]] = {
    "three-pools": {},
    "one-pool": one_pool(),
    "two-models": {
        "pools": [pool("small"), pool("large", models=["jina-embeddings-v3", "jina-embeddings-v2-base-en"])]
    },
    "canary": {
        "pools": [
            pool("stable", weight=95, replicas=3),
            pool("canary", weight=5, podLabels={"track": "canary"}, image={"tag": "0.2.0"}),
            pool("spot", weight=0, nodeSelector={"capacity": "spot"}),
        ]
    },
    "every-capability": {
        "pools": [pool(name, capability=name) for name in ("embed", "rerank", "classify", "batch")]
    },
    "all-in-one": one_pool(capability=["embed", "rerank", "classify", "batch"]),
    "gpu": one_pool(
        device={"type": "gpu", "count": 2, "product": "NVIDIA-L40S", "runtimeClassName": "nvidia"}
    ),
    "mig": one_pool(device={"type": "gpu", "resourceName": "nvidia.com/mig-1g.10gb"}),
    "replicas": one_pool(replicas=3),
    "keda": MONITORED | one_pool(autoscaling={"enabled": True, "minReplicas": 2, "maxReplicas": 6}),
    "hpa": MONITORED | one_pool(autoscaling={"enabled": True, "provider": "hpa", "maxReplicas": 5}),
    "zero": MONITORED
    | {
        "pools": [
            pool("a", autoscaling={"enabled": True, "minReplicas": 0}),
            pool("batch", capability="batch", autoscaling={"enabled": True, "minReplicas": 0}),
        ],
        "database": {"existingSecret": "pg"},
        "objectStore": {"url": "gs://bucket"},
    },
    "batch-keda": MONITORED
    | {
        "pools": [
            pool("batch", capability="batch", autoscaling={"enabled": True, "fallback": {"replicas": 1}})
        ],
        "database": {"existingSecret": "pg"},
        "objectStore": {"url": "gs://bucket"},
        "webhooks": {"existingSecret": "hooks"},
    },
    "batch-hpa": MONITORED
    | {
        "pools": [
            pool("all", capability=["embed", "batch"], autoscaling={"enabled": True, "provider": "hpa"})
        ],
        "database": {"existingSecret": "pg"},
        "objectStore": {"url": "s3://bucket/batches", "existingSecret": "s3"},
    },
    "batch-pools": {
        "pools": [
            pool("small", capability=["embed", "batch"]),
            pool("large", capability="batch", models=["jina-embeddings-v3"]),
        ],
        "database": {"existingSecret": "pg"},
        "objectStore": {"url": "s3://bucket/batches", "existingSecret": "s3"},
    },
    "cache-once": one_pool(
        modelCache={"type": "pvc", "accessMode": "ReadWriteOnce"},
        strategy={"maxSurge": 0, "maxUnavailable": 1},
    ),
    "cache-pvc": one_pool(modelCache={"type": "pvc", "size": "100Gi", "storageClassName": "shared"}),
    "cache-claim": one_pool(modelCache={"type": "pvc", "existingClaim": "weights", "readOnly": True}),
    "cache-shared": {
        "poolDefaults": {"modelCache": {"type": "pvc", "shared": True, "size": "90Gi"}},
        "pools": [pool("a"), pool("b", models=["jina-embeddings-v3"], replicas=2)],
    },
    "cache-image": one_pool(
        modelCache={"type": "image", "image": "registry.site.internal/weights:1", "path": "/models"}
    ),
    "cache-host": one_pool(modelCache={"type": "hostPath", "path": "/var/models", "readOnly": True}),
    "warm-up": {
        "poolDefaults": {
            "modelCache": {"type": "pvc", "shared": True, "warmUp": {"enabled": True}},
            "prefetch": {"tokenSecret": {"name": "hub"}},
        },
        "catalog": {"aliases": {"company-embedder": "all-MiniLM-L6-v2"}},
        "pools": [
            pool("a", settings={"model_aliases": {"small": "all-MiniLM-L6-v2"}}, models=["small"]),
            pool("b", modelCache={"warmUp": {"models": ["jina-embeddings-v3"]}}),
            pool(
                "gpus",
                models=["jina-embeddings-v2-base-de"],
                device={"type": "gpu", "product": "NVIDIA-L40S"},
                modelCache={"type": "hostPath", "path": "/var/models"},
            ),
            pool("own", models=["jina-embeddings-v2-base-en"], modelCache={"shared": False}),
        ],
    },
    "no-prefetch": one_pool(prefetch={"enabled": False}),
    "hub-mirror": one_pool(
        prefetch={"hubEndpoint": "https://hub.site.internal:8443", "tokenSecret": {"name": "hub"}}
    ),
    "settings": {
        "settings": {"max_items": 1000, "log_level": "warning"},
        **one_pool(settings={"dtype": "float32"}),
    },
    "batch-workers": {
        "pools": [pool("batch", capability="batch", replicas=3)],
        "database": {"existingSecret": "pg"},
        "objectStore": {"url": "s3://bucket/batches", "existingSecret": "s3"},
    },
    "batch-shared-claim": {
        "pools": [pool("batch", capability="batch", replicas=2, persistence={"existingClaim": "shared"})],
        "database": {"existingSecret": "pg", "secretKey": "dsn"},
    },
    "no-persistence": {"pools": [pool("batch", capability="batch", persistence={"enabled": False})]},
    "evaluation-stores": {"evaluation": {"redis": {"enabled": True}, "postgresql": {"enabled": True}}},
    "stores": {"database": {"existingSecret": "pg"}, "redis": {"existingSecret": "redis"}},
    "keys": {"auth": {"keys": KEYS}},
    "keys-secret": {"auth": {"existingSecret": "keys"}, "tests": {"apiKeySecret": {"name": "test-key"}}},
    "no-auth": {"auth": {"enabled": False}},
    "tls-secret": {"gateway": {"tls": {"enabled": True, "existingSecret": "site-tls"}}},
    "tls-cert-manager": {
        "gateway": {
            "tls": {
                "enabled": True,
                "certManager": {"enabled": True, "issuerRef": ISSUER, "dnsNames": ["search.example.com"]},
            }
        }
    },
    "mtls-own-authority": {"mtls": {"enabled": True, "certManager": {"enabled": True}}},
    "mtls-issuer": {"mtls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": ISSUER}}},
    "mtls-secrets": {"mtls": {"enabled": True, "gatewaySecret": "gw", "poolSecret": "pools"}},
    "ingress": {
        "gateway": {"ingress": {"enabled": True, "className": "nginx", "hosts": ["search.example.com"]}}
    },
    "gateway-api": {
        "gateway": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "edge"}],
                "hostnames": ["search.example.com"],
            },
            "grpcRoute": {"enabled": True, "parentRefs": [{"name": "edge", "sectionName": "grpc"}]},
        }
    },
    "gateway-api-tls": {
        "gateway": {
            "tls": {"enabled": True, "existingSecret": "site-tls"},
            "backendTls": {"caConfigMap": "site-ca"},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}]},
            "grpcRoute": {"enabled": True, "parentRefs": [{"name": "edge"}]},
        }
    },
    "load-balancer": {
        "gateway": {
            "service": {"type": "LoadBalancer", "port": 8443, "loadBalancerSourceRanges": ["192.0.2.0/24"]},
            "grpc": {
                "service": {
                    "type": "LoadBalancer",
                    "nodePort": 30051,
                    "loadBalancerClass": "internal",
                    "loadBalancerSourceRanges": ["10.0.0.0/8"],
                    "externalTrafficPolicy": "Local",
                }
            },
        }
    },
    "node-port": {"gateway": {"service": {"type": "NodePort", "nodePort": 30080}}},
    "no-grpc": {"gateway": {"grpc": {"enabled": False}}},
    "slices": {
        "gateway": {"endpoints": "slices"},
        "mtls": {"enabled": True, "certManager": {"enabled": True}},
    },
    "gateway-scaled": {"gateway": {"autoscaling": {"enabled": True}}},
    "gateway-single": {"gateway": {"replicas": 1}},
    "observed": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "scrapeAnnotations": True,
        },
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Search"}},
        "alerts": {"enabled": True, "alertLabels": {"team": "search"}},
    },
    "open-network": {"networkPolicy": {"enabled": False}},
    "named-callers": {
        "networkPolicy": {
            "gatewayCallers": [
                {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "apps"}}}
            ],
            "poolCallers": [{"podSelector": {"matchLabels": {"app": "indexer"}}}],
        }
    },
    "registry": {
        "global": {"imageRegistry": "registry.site.internal/mirror/", "imagePullSecrets": [{"name": "pull"}]},
        "evaluation": {"redis": {"enabled": True}},
    },
    "digests": {"image": {"digest": DIGEST, "cudaDigest": "sha256:" + "ef" * 32}},
    "labelled": {"commonLabels": {"cost-centre": "search"}, "commonAnnotations": {"owner": "platform"}},
    "catalog": {"catalog": {"aliases": {"company-embedder": "all-MiniLM-L6-v2"}}},
    "aliases": {
        "pools": [
            pool("large", models=["jina-embeddings-v3"]),
            pool("small", settings={"model_aliases": {"company-embedder": "all-MiniLM-L6-v2"}}),
        ]
    },
    "ipv6": {"listenAddress": "::"},
    "dual-stack": {"ipFamilyPolicy": "PreferDualStack", "evaluation": {"redis": {"enabled": True}}},
    "openshift": {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    "extras": {
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-own"}},
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: {{ .Release.Name }}-own\n",
        ],
        **one_pool(
            extraEnv=[{"name": "HTTPS_PROXY", "value": "http://proxy.site:3128"}],
            extraVolumes=[{"name": "ca", "configMap": {"name": "site-ca"}}],
            extraVolumeMounts=[{"name": "ca", "mountPath": "/etc/ssl/site"}],
            initContainers=[{"name": "wait", "image": "busybox"}],
            sidecars=[{"name": "proxy", "image": "proxy"}],
        ),
        "gateway": {
            "extraEnv": [{"name": "ENVOY_UID", "value": "0"}],
            "extraVolumes": [{"name": "ca", "configMap": {"name": "site-ca"}}],
            "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/site"}],
            "initContainers": [{"name": "wait", "image": "busybox"}],
            "sidecars": [{"name": "proxy", "image": "proxy"}],
        },
    },
    "placement": one_pool(
        nodeSelector={"disk": "fast"},
        tolerations=[{"key": "search", "operator": "Exists"}],
        affinity={"nodeAffinity": {}},
        priorityClassName="high",
        schedulerName="bin-packer",
        dnsConfig={"options": [{"name": "ndots", "value": "2"}]},
        hostAliases=[{"ip": "10.1.2.3", "hostnames": ["hub.site.internal"]}],
        topologySpread={"enabled": False},
    ),
}

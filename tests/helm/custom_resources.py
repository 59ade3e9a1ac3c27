"""Shapes of the custom resources that the chart makes, as their operators define them.

Written from the resources' documentation, for the fields that somebody could use here; any other field is
refused, and so is any kind that is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def some(*words: str | int) -> Schema:
    """One of these words."""
    return {"enum": list(words)}


def listed(item: Schema) -> Schema:
    """A list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def has(required: str, /, **fields: Schema) -> Schema:
    """An object of these fields; those named in ``required`` must be there."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


LABELS = has("matchLabels", matchLabels=TEXTS)
ISSUER = has("name", name=TEXT, kind=some("Issuer", "ClusterIssuer"), group=TEXT)
PARENT = has("name", name=TEXT, namespace=TEXT, kind=TEXT, group=TEXT, sectionName=TEXT, port=PORT)
BACKEND = has("name port", name=TEXT, port=PORT, namespace=TEXT, kind=TEXT, group=TEXT, weight=COUNT)
HOSTS = listed({"type": "string", "pattern": r"^(\*\.)?[a-z0-9.-]+$", "maxLength": 253})
DIRECTION = has(
    "policies",
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    selectPolicy=some("Max", "Min", "Disabled"),
    policies=listed(
        has(
            "type value periodSeconds",
            type=some("Pods", "Percent"),
            value={"type": "integer", "minimum": 1},
            periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
        )
    ),
)
BEHAVIOR = has("", scaleUp=DIRECTION, scaleDown=DIRECTION)
TRIGGER = has(
    "type metadata",
    type=TEXT,
    name=TEXT,
    metadata=TEXTS,
    metricType=some("AverageValue", "Value", "Utilization"),
    useCachedMetrics={"type": "boolean"},
    authenticationRef=has(
        "name", name=TEXT, kind=some("TriggerAuthentication", "ClusterTriggerAuthentication")
    ),
)

SPECS: Mapping[str, tuple[str, Schema]] = {
    "ScaledObject": (
        "keda.sh/v1alpha1",
        has(
            "scaleTargetRef triggers",
            scaleTargetRef=has(
                "name", name=TEXT, apiVersion=some("apps/v1"), kind=some("Deployment", "StatefulSet")
            ),
            pollingInterval=COUNT,
            cooldownPeriod=COUNT,
            minReplicaCount=COUNT,
            maxReplicaCount={"type": "integer", "minimum": 1},
            fallback=has(
                "failureThreshold replicas",
                failureThreshold=COUNT,
                replicas=COUNT,
                behavior=some(
                    "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"
                ),
            ),
            advanced=has("", horizontalPodAutoscalerConfig=has("", name=TEXT, behavior=BEHAVIOR)),
            triggers=listed(TRIGGER),
        ),
    ),
    "TriggerAuthentication": (
        "keda.sh/v1alpha1",
        has(
            "",
            secretTargetRef=listed(has("parameter name key", parameter=TEXT, name=TEXT, key=TEXT)),
        ),
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        has(
            "selector endpoints",
            selector=LABELS,
            jobLabel=TEXT,
            endpoints=listed(
                has(
                    "port",
                    port=TEXT,
                    path=TEXT,
                    interval=DURATION,
                    scrapeTimeout=DURATION,
                    relabelings=listed(
                        has("", action=some("replace", "keep", "drop"), targetLabel=TEXT, replacement=TEXT)
                    ),
                )
            ),
        ),
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        has(
            "groups",
            groups=listed(
                has(
                    "name rules",
                    name=TEXT,
                    interval=DURATION,
                    rules=listed(
                        has(
                            "alert expr",
                            **{
                                "alert": TEXT,
                                "expr": TEXT,
                                "for": DURATION,
                                "labels": TEXTS,
                                "annotations": TEXTS,
                            },
                        )
                    ),
                )
            ),
        ),
    ),
    "Certificate": (
        "cert-manager.io/v1",
        has(
            "secretName issuerRef",
            secretName=TEXT,
            issuerRef=ISSUER,
            isCA={"type": "boolean"},
            commonName={"type": "string", "minLength": 1, "maxLength": 64},
            dnsNames=listed({"type": "string", "minLength": 1, "maxLength": 253}),
            duration={"type": "string", "pattern": r"^([0-9]+(s|m|h))+$"},
            privateKey=has(
                "algorithm",
                algorithm=some("RSA", "ECDSA", "Ed25519"),
                size=some(256, 384, 521),
                rotationPolicy=some("Never", "Always"),
            ),
            usages=listed(some("server auth", "client auth", "cert sign", "digital signature")),
        ),
    ),
    "Issuer": ("cert-manager.io/v1", has("", selfSigned=has(""), ca=has("secretName", secretName=TEXT))),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        has(
            "parentRefs rules",
            parentRefs=listed(PARENT),
            hostnames=HOSTS,
            rules=listed(
                has(
                    "backendRefs",
                    matches=listed(
                        has(
                            "path",
                            path=has(
                                "type value",
                                type=some("Exact", "PathPrefix"),
                                value={"type": "string", "pattern": "^/"},
                            ),
                        )
                    ),
                    backendRefs=listed(BACKEND),
                )
            ),
        ),
    ),
    "BackendTLSPolicy": (
        "gateway.networking.k8s.io/v1",
        has(
            "targetRefs validation",
            targetRefs=listed(
                has("group kind name", group={"const": ""}, kind=some("Service"), name=TEXT, sectionName=TEXT)
            ),
            validation=has(
                "hostname",
                hostname={"type": "string", "pattern": r"^[a-z0-9.-]+$", "maxLength": 253},
                wellKnownCACertificates=some("System"),
                caCertificateRefs=listed(
                    has("group kind name", group={"const": ""}, kind=some("ConfigMap"), name=TEXT)
                ),
            ),
        ),
    ),
    "GRPCRoute": (
        "gateway.networking.k8s.io/v1",
        has(
            "parentRefs rules",
            parentRefs=listed(PARENT),
            hostnames=HOSTS,
            rules=listed(has("backendRefs", backendRefs=listed(BACKEND))),
        ),
    ),
}


def validate(manifest: Mapping[str, Any]) -> None:
    """Raise jsonschema.ValidationError for an object that its operator would refuse or read otherwise."""
    api_version, spec = SPECS[manifest["kind"]]
    schema = has(
        "apiVersion kind metadata spec",
        apiVersion=some(api_version),
        kind=some(manifest["kind"]),
        metadata=has("name namespace labels", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=spec,
    )
    jsonschema.validate(manifest, schema)

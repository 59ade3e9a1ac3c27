"""What docs/platforms.md gives other platforms: fields they have, and words and settings that we have."""

from __future__ import annotations

import argparse
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from search_foundation.commands import up
from services.core.settings import Settings
from tests.helm.chart import REPOSITORY, Manifest
from tests.helm.custom_resources import COUNT, TEXT, TEXTS, Schema, has, listed

_ANY: Schema = {"type": "object"}
# KServe 0.21, without what a container has: that is asked of Kubernetes' own schema.
KSERVE = {
    "ServingRuntime": has(
        "supportedModelFormats containers",
        supportedModelFormats=listed(
            has("name", name=TEXT, version=TEXT, autoSelect={"type": "boolean"}, priority=COUNT)
        ),
        containers=listed(_ANY),
        protocolVersions=listed(TEXT),
        multiModel={"type": "boolean"},
        annotations=TEXTS,
        labels=TEXTS,
        nodeSelector=TEXTS,
        tolerations=listed(_ANY),
        affinity=_ANY,
        volumes=listed(_ANY),
        imagePullSecrets=listed(_ANY),
        schedulerName=TEXT,
    ),
    "InferenceService": has(
        "predictor",
        predictor=has(
            "model",
            minReplicas=COUNT,
            maxReplicas=COUNT,
            timeout=COUNT,
            canaryTrafficPercent=COUNT,
            containerConcurrency=COUNT,
            serviceAccountName=TEXT,
            nodeSelector=TEXTS,
            tolerations=listed(_ANY),
            model=has(
                "modelFormat storageUri",
                modelFormat=has("name", name=TEXT, version=TEXT),
                runtime=TEXT,
                storageUri={"type": "string", "pattern": "^(oci|s3|gs|pvc|hf|https)://"},
                resources=_ANY,
                args=listed(TEXT),
                env=listed(_ANY),
            ),
        ),
    ),
}


def kserve() -> dict[str, Manifest]:
    """The objects of the page by their kinds."""
    text = (REPOSITORY / "docs" / "platforms.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n# kserve\n(.*?)```", text, re.DOTALL)
    return {document["kind"]: document for document in yaml.safe_load_all(block)}


def test_kserve_has_the_fields_of_its_objects() -> None:
    objects = kserve()
    assert objects.keys() == KSERVE.keys()
    for kind, manifest in objects.items():
        jsonschema.validate(manifest["spec"], KSERVE[kind])
        wrong: dict[str, Any] = manifest["spec"] | {"replicaCount": 1}
        with pytest.raises(jsonschema.ValidationError, match="replicaCount"):
            jsonschema.validate(wrong, KSERVE[kind])
    runtime, service = objects["ServingRuntime"], objects["InferenceService"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {f["name"] for f in runtime["spec"]["supportedModelFormats"]}
    assert runtime["metadata"]["namespace"] == service["metadata"]["namespace"]


def test_the_container_of_the_runtime_is_one_that_kubernetes_and_we_know() -> None:
    (container,) = kserve()["ServingRuntime"]["spec"]["containers"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {"containers": [container]},
    }
    kubernetes_validate.validate(pod, "1.32", strict=True)
    assert container["name"] == "kserve-container", "KServe finds it by this name"
    parser = argparse.ArgumentParser()
    up.add_parser(parser.add_subparsers())
    assert parser.parse_args(container["args"]).host == "0.0.0.0"
    ours = {entry["name"] for entry in container["env"] if entry["name"].startswith("SF_")}
    assert ours <= {f"SF_{field.upper()}" for field in Settings.model_fields}

"""From a topology and the catalogue to the file Envoy reads."""

from __future__ import annotations

from gateway import envoy
from gateway.openapi import build_openapi
from gateway.topology import Topology
from services.core.catalog import Catalog, model_info


def envoy_yaml(
    topology: Topology,
    catalog: Catalog,
    *,
    max_items: int = 2048,
    max_documents: int = 2048,
    max_classify_items: int = 512,
) -> str:
    """Render the configuration; raises CatalogError for a model nobody knows.

    ``max_items``, ``max_documents`` and ``max_classify_items`` are the services' limits on one request, which
    the OpenAPI document tells.
    """
    specs = {model: catalog.require(model) for model in topology.models}
    served = {
        capability: [
            specs[model]
            for pool in topology.pools_of(capability)
            for model in pool.models
            if specs[model].supports(capability)
        ]
        for capability in topology.capabilities
    }
    infos = {model: model_info(spec) for model, spec in specs.items()}
    document = build_openapi(
        served,
        max_items=max_items,
        max_documents=max_documents,
        max_classify_items=max_classify_items,
    )
    return envoy.to_yaml(envoy.render(topology, infos, document))

"""From a topology and the catalogue to the file Envoy reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gateway import envoy
from gateway.contract import has_services
from gateway.openapi import build_openapi
from gateway.topology import Pool, Topology
from services.core.catalog import Catalog, CatalogError, model_info
from services.core.catalog.types import Capability, ModelSpec, OutputKind
from services.core.openapi.parts import Bounds
from services.core.requests.limits import largest_body
from services.embed.vendors.tei import gives, gives_tokens


def envoy_yaml(topology: Topology, catalog: Catalog, **options: Any) -> str:
    """The whole configuration as one file; takes and raises what ``configuration`` does."""
    return envoy.to_yaml(configuration(topology, catalog, **options))


def configuration(
    topology: Topology,
    catalog: Catalog,
    *,
    bounds: Bounds | None = None,
    default_model: str | None = None,
) -> dict[str, Any]:
    """Envoy's configuration as plain data; raises CatalogError for what nobody serves.

    ``bounds`` are the services' limits on one request, which the OpenAPI document tells; ``default_model``
    is what answers calls that name none.
    """
    for capability in topology.capabilities:
        if not has_services(capability):
            pools = ", ".join(pool.name for pool in topology.pools_of(capability))
            raise CatalogError(f"Pool {pools}: this version has no service for the capability {capability}.")
    topology = _with_aliases(topology, catalog)
    specs = {model: catalog.require(model) for model in topology.models}
    # Once each, also those that several pools share.
    named = {
        capability: [
            specs[model]
            for model in dict.fromkeys(m for pool in topology.pools_of(capability) for m in pool.models)
        ]
        for capability in topology.capabilities
    }
    served = {
        capability: [spec for spec in named[capability] if spec.supports(capability)] for capability in named
    }
    limits = topology.limits
    bodies = {
        capability: largest_body(
            capability,
            named[capability],
            limits.max_text_body_bytes,
            limits.max_body_bytes,
        )
        for capability in topology.capabilities
    }
    infos = {model: model_info(spec) for model, spec in specs.items()}
    document = build_openapi(served, bounds)
    embedders = served.get(Capability.EMBED, ())
    nameless = dict(_nameless(topology, specs, catalog, default_model))
    return envoy.render(topology, infos, bodies, document, embedders, nameless)


def _nameless(
    topology: Topology, specs: Mapping[str, ModelSpec], catalog: Catalog, default_model: str | None
) -> Iterator[tuple[str, str]]:
    """Models of calls that name none, by rpc: the default one, else the first that can answer."""
    default = catalog.get(default_model) if default_model is not None else None
    for rpc, (capability, can) in _NAMELESS.items():
        models = [
            model
            for pool in topology.pools_of(capability)
            for model in pool.models
            if specs[model].supports(capability) and can(specs[model])
        ]
        if models:
            yield rpc, default.id if default is not None and default.id in models else models[0]


_Can = Callable[[ModelSpec], bool]
_NAMELESS: Mapping[str, tuple[Capability, _Can]] = {
    "TeiEmbed": (Capability.EMBED, gives(OutputKind.DENSE)),
    "TeiSimilarity": (Capability.EMBED, gives(OutputKind.DENSE)),
    "TeiEmbedAll": (Capability.EMBED, gives_tokens),
    "TeiEmbedSparse": (Capability.EMBED, gives(OutputKind.SPARSE)),
    "TeiInfo": (Capability.EMBED, lambda _: True),
    "TeiRerank": (Capability.RERANK, lambda _: True),
}


def _with_aliases(topology: Topology, catalog: Catalog) -> Topology:
    """The topology with short model ids, and with the aliases of each pool's models."""
    pools = [
        pool.model_copy(update={"models": tuple(catalog.require(name).id for name in pool.models)})
        for pool in topology.pools
    ]
    return topology.model_copy(
        update={"pools": tuple(_with_aliases_of_its_models(pool, pools, catalog) for pool in pools)}
    )


def _with_aliases_of_its_models(pool: Pool, pools: Sequence[Pool], catalog: Catalog) -> Pool:
    # An alias may have a pool of its own, beside that of its target.
    elsewhere = {
        model
        for other in pools
        if other.name != pool.name and not set(other.capabilities).isdisjoint(pool.capabilities)
        for model in other.models
    }
    models = (spec.id for spec in catalog.select(pool.models))
    own = tuple(model for model in models if model in pool.models or model not in elsewhere)
    return pool.model_copy(update={"models": own})

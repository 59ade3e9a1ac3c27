"""Embedding as a capability of a serving process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc.aio
from searchfoundation.v1 import embed_pb2, embed_pb2_grpc, embed_rest_pb2, embed_rest_pb2_grpc

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.catalog.weights import locate
from services.core.inference import Engine
from services.core.requests.defaults import DefaultModels
from services.core.requests.limits import RequestLimits
from services.core.settings import Settings
from services.embed.grpc import EmbedServicer, EmbedStreamLimits
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.rest import EmbedRestServicer
from services.embed.vendors import tei
from services.embed.vendors.rest import EmbedVendorsServicer


class EmbedCapability:
    """``EmbedService``, ``EmbedRestService`` and ``EmbedVendorsRestService`` over one engine."""

    name = "embed"
    service_names = (
        embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name,
        embed_rest_pb2.DESCRIPTOR.services_by_name["EmbedRestService"].full_name,
        embed_rest_pb2.DESCRIPTOR.services_by_name["EmbedVendorsRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings) -> None:
        self.max_body_bytes = RequestLimits.of(settings).body("embed", engine.served)
        parser = RequestParser(catalog, engine.served, max_items=settings.max_items)
        embedder = Embedder(engine, settings)
        limits = EmbedStreamLimits(
            messages=settings.stream_window,
            size=self.max_body_bytes,
            timeout=settings.request_timeout_seconds,
        )
        self._typed = EmbedServicer(parser, embedder, limits)
        self._rest = EmbedRestServicer(parser, embedder)
        specs = {spec.id: spec for spec in engine.served if spec.supports(Capability.EMBED)}
        self._vendors = EmbedVendorsServicer(
            parser,
            embedder,
            DefaultModels(catalog, settings, engine.served, Capability.EMBED),
            specs,
            _Infos(engine, settings, specs),
            settings.max_items,
        )

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the services."""
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(self._typed, server)
        embed_rest_pb2_grpc.add_EmbedRestServiceServicer_to_server(self._rest, server)
        embed_rest_pb2_grpc.add_EmbedVendorsRestServiceServicer_to_server(self._vendors, server)

    async def start(self) -> None:
        """Nothing to do: the engine is warm before it is handed over."""

    async def stop(self) -> None:
        """Nothing to let go of: the engine belongs to whoever started it."""


class _Infos:
    """What ``/info`` says of each model."""

    def __init__(self, engine: Engine, settings: Settings, specs: Mapping[str, ModelSpec]) -> None:
        self._engine = engine
        self._settings = settings
        self._poolings = {name: tei.pooling(spec, locate(spec, settings)) for name, spec in specs.items()}

    def __call__(self, spec: ModelSpec) -> dict[str, Any]:
        """Describe a model, whose passes may have another size once it is loaded."""
        tokens = self._engine.batch_tokens(spec)
        return tei.info(spec, self._settings, self._poolings[spec.id], self._engine.dtype, tokens)


def build(engine: Engine, catalog: Catalog, settings: Settings) -> EmbedCapability:
    """Make the capability for the models that ``engine`` serves."""
    return EmbedCapability(engine, catalog, settings)

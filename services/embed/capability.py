"""Embedding as a capability of a serving process."""

from __future__ import annotations

import grpc.aio
from searchfoundation.v1 import embed_pb2, embed_pb2_grpc, embed_rest_pb2, embed_rest_pb2_grpc

from services.core.catalog import Catalog
from services.core.inference import Engine
from services.core.requests.defaults import default_model
from services.core.requests.limits import RequestLimits
from services.core.settings import Settings
from services.embed.grpc import EmbedServicer
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.rest import EmbedRestServicer
from services.embed.stream import StreamLimits


class EmbedCapability:
    """``EmbedService`` and ``EmbedRestService`` over one engine."""

    name = "embed"
    service_names = (
        embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name,
        embed_rest_pb2.DESCRIPTOR.services_by_name["EmbedRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings) -> None:
        self.max_body_bytes = RequestLimits.of(settings).body("embed", engine.served)
        parser = RequestParser(catalog, engine.served, max_items=settings.max_items)
        embedder = Embedder(engine, settings)
        limits = StreamLimits(
            messages=settings.stream_window,
            size=self.max_body_bytes,
            timeout=settings.request_timeout_seconds,
        )
        self._typed = EmbedServicer(parser, embedder, limits)
        default = default_model(settings, engine.served, "embed")
        self._rest = EmbedRestServicer(parser, embedder, default)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register both services."""
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(self._typed, server)
        embed_rest_pb2_grpc.add_EmbedRestServiceServicer_to_server(self._rest, server)

    async def start(self) -> None:
        """Nothing to do: the engine is warm before it is handed over."""

    async def stop(self) -> None:
        """Nothing to let go of: the engine belongs to whoever started it."""


def build(engine: Engine, catalog: Catalog, settings: Settings) -> EmbedCapability:
    """Make the capability for the models that ``engine`` serves."""
    return EmbedCapability(engine, catalog, settings)

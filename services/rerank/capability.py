"""Reranking as a capability of a serving process."""

from __future__ import annotations

import grpc.aio
from searchfoundation.v1 import rerank_pb2, rerank_pb2_grpc, rerank_rest_pb2, rerank_rest_pb2_grpc

from services.core.catalog import Catalog
from services.core.catalog.types import Capability
from services.core.inference import Engine
from services.core.requests.defaults import DefaultModels
from services.core.requests.limits import RequestLimits
from services.core.settings import Settings
from services.rerank.grpc import RerankServicer, RerankStreamLimits
from services.rerank.logic import Reranker
from services.rerank.parsing import RequestParser
from services.rerank.rest import RerankRestServicer


class RerankCapability:
    """``RerankService``, ``RerankRestService`` and ``RerankVendorsRestService`` over one engine."""

    name = "rerank"
    service_names = (
        rerank_pb2.DESCRIPTOR.services_by_name["RerankService"].full_name,
        rerank_rest_pb2.DESCRIPTOR.services_by_name["RerankRestService"].full_name,
        rerank_rest_pb2.DESCRIPTOR.services_by_name["RerankVendorsRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings) -> None:
        self.max_body_bytes = RequestLimits.of(settings).body("rerank", engine.served)
        parser = RequestParser(catalog, engine.served, max_documents=settings.max_documents)
        reranker = Reranker(engine)
        limits = RerankStreamLimits(
            documents=settings.max_documents,
            size=self.max_body_bytes,
            timeout=settings.request_timeout_seconds,
        )
        object_models = frozenset(
            spec.id for spec in engine.served if spec.rerank_objects or settings.rerank_objects
        )
        self._typed = RerankServicer(parser, reranker, limits)
        defaults = DefaultModels(catalog, settings, engine.served, Capability.RERANK)
        self._rest = RerankRestServicer(parser, reranker, object_models, defaults)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the services."""
        rerank_pb2_grpc.add_RerankServiceServicer_to_server(self._typed, server)
        rerank_rest_pb2_grpc.add_RerankRestServiceServicer_to_server(self._rest, server)
        rerank_rest_pb2_grpc.add_RerankVendorsRestServiceServicer_to_server(self._rest.vendors, server)

    async def start(self) -> None:
        """Nothing to do: the engine is warm before it is handed over."""

    async def stop(self) -> None:
        """Nothing to let go of: the engine belongs to whoever started it."""


def build(engine: Engine, catalog: Catalog, settings: Settings) -> RerankCapability:
    """Make the capability for the models that ``engine`` serves."""
    return RerankCapability(engine, catalog, settings)

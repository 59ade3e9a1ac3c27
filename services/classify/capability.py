"""Classification as a capability of a serving process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc.aio
from searchfoundation.v1 import (
    classify_pb2,
    classify_pb2_grpc,
    classify_rest_pb2,
    classify_rest_pb2_grpc,
)

from services.classify.few_shot import ClassifierLimits, FewShot
from services.classify.grpc import ClassifyServicer
from services.classify.rest import ClassifyRestServicer
from services.classify.schema import ClassifyParser
from services.classify.table import CLASSIFIERS, ClassifierTable
from services.classify.zero_shot import ZeroShot
from services.core.catalog import Catalog
from services.core.inference import Engine
from services.core.requests.limits import RequestLimits
from services.core.settings import Settings
from services.core.storage import Database


class ClassifyCapability:
    """``ClassifyService`` and ``ClassifyRestService`` over one engine and one database."""

    name = "classify"
    service_names = (
        classify_pb2.DESCRIPTOR.services_by_name["ClassifyService"].full_name,
        classify_rest_pb2.DESCRIPTOR.services_by_name["ClassifyRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings, database: Database) -> None:
        self.max_body_bytes = RequestLimits.of(settings).body("classify", engine.served)
        parser = ClassifyParser(catalog, engine.served, max_items=settings.max_classify_items)
        # One thread: learning takes the interpreter from the event loop, and two at a time would twice.
        self._executor = ThreadPoolExecutor(1, "classify")
        self._database = database
        zero_shot = ZeroShot(engine, self._executor, settings.label_cache_bytes)
        limits = ClassifierLimits(
            settings.max_classifiers,
            settings.max_classifier_labels,
            {name: tier.classifiers for name, tier in settings.tiers.items()},
        )
        self._few_shot = FewShot(engine, ClassifierTable(database), self._executor, limits)
        self._typed = ClassifyServicer(parser, zero_shot, self._few_shot)
        self._rest = ClassifyRestServicer(parser, zero_shot, self._few_shot)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register both services."""
        classify_pb2_grpc.add_ClassifyServiceServicer_to_server(self._typed, server)
        classify_rest_pb2_grpc.add_ClassifyRestServiceServicer_to_server(self._rest, server)

    async def start(self) -> None:
        """Make the tables; a database that is away is tried again at its next use."""
        await self._database.use(CLASSIFIERS)
        self._few_shot.uses.start()

    async def stop(self) -> None:
        """Write what was counted. Engine and database belong to whoever opened them."""
        await self._few_shot.uses.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)


def build(engine: Engine, catalog: Catalog, settings: Settings, database: Database) -> ClassifyCapability:
    """Make the capability for the models that ``engine`` serves; classifiers are kept in ``database``."""
    return ClassifyCapability(engine, catalog, settings, database)

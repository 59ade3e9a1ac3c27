"""Asynchronous jobs as a capability of a serving process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc.aio
from searchfoundation.v1 import batch_pb2, batch_pb2_grpc, batch_rest_pb2, batch_rest_pb2_grpc

from services.batch.dbos_engine import DbosEngine
from services.batch.files import Files
from services.batch.grpc import BatchServicer
from services.batch.inputs import JobInputs, Sources
from services.batch.lines import LineReader
from services.batch.metrics import BacklogGauges
from services.batch.openai import OpenAIBatchServicer
from services.batch.rest import BatchRestServicer
from services.batch.schema import BatchParser
from services.batch.service import BatchService, Housekeeper
from services.batch.table import JobTable
from services.batch.tables import BATCH
from services.batch.uploads import Uploads
from services.batch.webhook import Webhooks, WebhookSecrets
from services.batch.worker import Worker
from services.core.access.balances import Balances
from services.core.access.schema import ACCESS
from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ServiceError
from services.core.inference import Engine
from services.core.requests.limits import RequestLimits
from services.core.settings import ConfigurationError, Settings
from services.core.storage import Database
from services.core.storage.objects import ObjectStoreError, open_store

logger = logging.getLogger(__name__)


async def repeat(work: Callable[[], Awaitable[None]], seconds: float, closing: asyncio.Event) -> None:
    """Do ``work`` now and after every pause of ``seconds``, whatever came of it, until the event."""
    while not closing.is_set():
        try:
            # What is away tells so itself, and this is tried again.
            with suppress(ServiceError, ObjectStoreError):
                await work()
        except Exception:
            logger.exception("%s failed and is tried again", work.__qualname__)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing.wait(), seconds)


_STOP_SECONDS = 5.0
"""Of the grace period, at most: chunks that take longer are left to others, or to the next start."""

_LOOK_SECONDS = 5.0
"""Between looks at all jobs: for what has expired, and for the gauges."""

_INTERRUPT_SECONDS = 0.5
"""Between looks at the jobs that are worked on here, for those that were cancelled elsewhere."""


class BatchCapability:
    """``BatchService`` and ``BatchRestService``, and the worker of this process."""

    name = "batch"
    service_names = (
        batch_pb2.DESCRIPTOR.services_by_name["BatchService"].full_name,
        batch_rest_pb2.DESCRIPTOR.services_by_name["BatchRestService"].full_name,
        batch_rest_pb2.DESCRIPTOR.services_by_name["OpenAIBatchRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self.max_body_bytes = RequestLimits.of(settings).body("batch", engine.served)
        served = _models(engine, catalog, settings)
        parser = BatchParser(catalog, served)
        self._jobs = DbosEngine(settings, database, parser.models)
        table, store = JobTable(database), open_store(settings)
        files = Files(table, store)
        self._webhooks = Webhooks(settings, WebhookSecrets(settings, database))
        self._sources = Sources(settings)
        self._worker = Worker(
            settings,
            engine,
            self._jobs,
            table,
            store,
            files,
            JobInputs(
                settings, store, self._sources, LineReader(catalog, served, max_items=settings.max_items)
            ),
            self._webhooks,
            Balances(settings, database),
        )
        service = BatchService(
            self._jobs,
            table,
            store,
            files,
            self._worker,
            self._webhooks.check_url,
            settings,
        )
        self._housekeeper = Housekeeper(self._jobs, table, files, self._worker)
        self._gauges = BacklogGauges(table)
        self._closing = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._typed = BatchServicer(parser, service, settings.public_url)
        self._rest = BatchRestServicer(parser, service, settings.public_url)
        self._uploads = Uploads(settings, database, table, store, files)
        self._openai = OpenAIBatchServicer(parser, service, self._uploads)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register both services."""
        batch_pb2_grpc.add_BatchServiceServicer_to_server(self._typed, server)
        batch_rest_pb2_grpc.add_BatchRestServiceServicer_to_server(self._rest, server)
        batch_rest_pb2_grpc.add_OpenAIBatchRestServiceServicer_to_server(self._openai, server)

    async def start(self) -> None:
        """Make the tables and take tasks; a database that is away is tried again."""
        await self._database.use(ACCESS, BATCH)
        await self._jobs.start(self._worker.do)
        self._loops = [
            asyncio.create_task(repeat(work, seconds, self._closing))
            for work, seconds in (
                (self._housekeeper.look, _LOOK_SECONDS),
                (self._uploads.expire, _LOOK_SECONDS),
                (self._gauges.read, _LOOK_SECONDS),
                (self._worker.interrupt, _INTERRUPT_SECONDS),
            )
        ]

    async def stop(self) -> None:
        """Finish the chunks at work or leave them to others."""
        self._closing.set()
        await asyncio.gather(*self._loops)
        await self._jobs.stop(min(_STOP_SECONDS, self._settings.grace_seconds / 2))
        await self._webhooks.close()
        await self._sources.close()


def _models(engine: Engine, catalog: Catalog, settings: Settings) -> tuple[ModelSpec, ...]:
    """Give the models that jobs may name; raises ``ConfigurationError`` for one that cannot be had here."""
    if settings.batch_models is None:
        return engine.served
    try:
        chosen = catalog.select(settings.batch_models)
    except CatalogError as error:
        raise ConfigurationError(f"SF_BATCH_MODELS: {error}") from error
    able = [spec.id for spec in engine.served if spec.supports(Capability.BATCH)]
    for spec in chosen:
        if spec.id not in able:
            raise ConfigurationError(
                f"SF_BATCH_MODELS names '{spec.id}'; models served here that batch jobs can use: "
                f"{', '.join(able) or 'none'}."
            )
    return chosen


def build(engine: Engine, catalog: Catalog, settings: Settings, database: Database) -> BatchCapability:
    """Make the capability for the models that ``engine`` serves; jobs are kept in ``database``."""
    return BatchCapability(engine, catalog, settings, database)

"""``search-foundation serve``: one gRPC server with the named capabilities."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import uvloop

from search_foundation.arguments import positive
from search_foundation.capabilities import CAPABILITIES, STORING
from search_foundation.servable import NotServableError, require_servable
from services.core.catalog import CatalogError
from services.core.folders import data_folder
from services.core.serving import PortInUseError, Server, StopReason
from services.core.serving.capability import ServingCapability
from services.core.serving.exposition import Exposition
from services.core.serving.logs import configure
from services.core.serving.ports import check_free, join, write_ports_file
from services.core.serving.workers import Supervisor, WorkerLink
from services.core.settings import ConfigurationError, Settings, load_settings

if TYPE_CHECKING:  # they load torch and SQLAlchemy, which other commands and the supervisor do without
    from services.core.catalog import Catalog
    from services.core.inference import Engine
    from services.core.storage import Database

logger = logging.getLogger(__name__)

_ENGINE_SECONDS = 1.0
"""For the engine to stop in: no call is in flight any more."""

_GC_THRESHOLDS = (10_000, 20, 50)
"""Calls make many short-lived objects; the defaults look for cycles among them every few calls."""


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("serve", help="run a gRPC server")
    names = ", ".join(CAPABILITIES)
    parser.add_argument(
        "capabilities",
        nargs="+",
        choices=tuple(CAPABILITIES),
        metavar="CAPABILITY",
        help=f"what to serve, one or more of: {names}",
    )
    parser.add_argument("--workers", type=positive, help="processes sharing the port (SF_WORKERS)")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; 0 after that, 1 when serving failed."""
    settings = load_settings()
    if args.workers is not None:
        settings = settings.model_copy(update={"workers": args.workers})
    names = tuple(dict.fromkeys(args.capabilities))
    _configure_logs(settings)
    try:
        require_servable(settings)
        if settings.workers > 1:
            return asyncio.run(_supervise(settings, names))
        # Before the engine is imported and the models load.
        check_free(settings.host, settings.grpc_port)
        return uvloop.run(_serve(settings, names, None))
    except (CatalogError, NotServableError, PortInUseError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except _engine_error() as error:
        print(error, file=sys.stderr)
        return 1


def _configure_logs(settings: Settings) -> None:
    configure(settings.log_level, text=settings.logs_text(sys.stderr))


async def _supervise(settings: Settings, names: Sequence[str]) -> int:
    def announce(grpc_port: int, metrics_port: int) -> None:
        _announce(settings, names, grpc_port, metrics_port)

    if settings.redis_url is None:
        logger.warning(
            "each of the %d workers keeps limits of its own; set SF_REDIS_URL to share them", settings.workers
        )
    try:
        return await Supervisor(settings, _work, names, announce).run()
    finally:
        _retract(settings)


def _work(settings: Settings, names: Sequence[str], link: WorkerLink) -> None:
    """Be one worker process."""
    _configure_logs(settings)
    try:
        status = uvloop.run(_serve(settings, names, link))
    except (CatalogError, ConfigurationError, PortInUseError, OSError, _engine_error()) as error:
        print(error, file=sys.stderr)
        status = 1
    sys.exit(status)


async def _serve(settings: Settings, names: Sequence[str], link: WorkerLink | None) -> int:
    """Load the models, serve, stop in order. The exit status is 1 when the engine failed."""
    from services.core.access import AccessControl
    from services.core.catalog import Catalog
    from services.core.inference import Engine
    from services.core.media.room import MediaRoom
    from services.core.serving.models import ModelsCapability

    server: Server | None = None
    exposition = Exposition(ready=lambda: server is not None and server.ready)
    async with AsyncExitStack() as stack:
        metrics_port = await _expose(exposition, settings, link)
        stack.push_async_callback(exposition.stop)
        catalog = Catalog.load(settings.catalog_file, settings.model_aliases)
        database = await _database(settings, names)
        if database is not None:
            stack.push_async_callback(database.close)
        access = await AccessControl.open(settings, database=database)
        stack.push_async_callback(access.close)
        media = MediaRoom(settings)
        stack.push_async_callback(media.aclose)
        engine = await Engine.start(settings, catalog, opener=media)
        stack.push_async_callback(engine.stop, _ENGINE_SECONDS)
        capabilities = [_build(name, engine, catalog, settings, database) for name in names]
        capabilities.append(ModelsCapability(catalog, engine.served))
        server = Server(settings, capabilities, engine, access, share_port=link is not None)
        if link is not None:
            await link.warm()
        await server.start()
        settle_garbage_collector()
        if link is not None:
            link.serving(server)
            return await _until_stopped(settings, server)
        server.stop_on_signals()
        _announce(settings, names, server.port, metrics_port)
        stack.callback(_retract, settings)
        return await _until_stopped(settings, server)


async def _expose(exposition: Exposition, settings: Settings, link: WorkerLink | None) -> int:
    """Open the metrics before the models load."""
    if link is not None:
        link.attach()
        await exposition.start_unix(link.metrics_path)
        return 0
    return await exposition.start(settings.host, settings.metrics_port)


async def _until_stopped(settings: Settings, server: Server) -> int:
    reason = await server.wait()
    _exit_after(settings.grace_seconds)
    await server.stop(drain=reason is StopReason.TERMINATED)
    return 1 if reason is StopReason.ENGINE_FAILED else 0


async def _database(settings: Settings, names: Sequence[str]) -> Database | None:
    """Open the one database of this process, if keys or a named capability are kept there."""
    from services.core.access.control import uses_database
    from services.core.storage import Database

    if not STORING.isdisjoint(names) or (settings.auth and uses_database(settings)):
        if settings.database_url is None:
            data_folder(settings.data_dir)
        return await Database.open(settings)
    return None


def _build(
    name: str, engine: Engine, catalog: Catalog, settings: Settings, database: Database | None
) -> ServingCapability:
    build: Callable[..., ServingCapability] = importlib.import_module(CAPABILITIES[name]).build
    if name in STORING:
        return build(engine, catalog, settings, database)
    return build(engine, catalog, settings)


def _announce(settings: Settings, names: Sequence[str], grpc_port: int, metrics_port: int) -> None:
    if settings.ports_file is not None:
        write_ports_file(settings.ports_file, grpc_port, metrics_port)
    print(
        f"search-foundation: serving {', '.join(names)} with {', '.join(settings.models)} on "
        f"{join(settings.host, grpc_port)}, metrics on {join(settings.host, metrics_port)}",
        flush=True,
    )


def _retract(settings: Settings) -> None:
    if settings.ports_file is not None:
        settings.ports_file.unlink(missing_ok=True)


def settle_garbage_collector() -> None:
    """Take what was made while starting out of the collector's sight: a pass over it takes 0.1 s and more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def _exit_after(seconds: float) -> None:
    """Keep the promise of the grace period even if something hangs while stopping."""

    def end() -> None:
        logger.error("stopping took longer than the grace period; exiting")
        logging.shutdown()
        os._exit(1)

    timer = threading.Timer(seconds + 1.0, end)
    timer.daemon = True
    timer.start()


def _engine_error() -> type[Exception]:
    """A further failure to start that is told in one sentence; naming it imports the engine."""
    from services.core.inference import EngineStartError

    return EngineStartError

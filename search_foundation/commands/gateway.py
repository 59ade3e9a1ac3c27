"""``search-foundation gateway``: Envoy in front of the services."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateway.build import envoy_yaml
from gateway.local import LOOPBACK, local_topology
from gateway.process import Envoy, EnvoyError, drain
from gateway.topology import Listener, Topology
from search_foundation.capabilities import implemented
from search_foundation.keeping import ChildEndedError, Kept, let_end
from search_foundation.signals import stop_signal
from services.core.catalog import Catalog, CatalogError
from services.core.settings import Settings, load_settings

_POLL_SECONDS = 0.1


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gateway", help="run Envoy in front of the services"
    )
    parser.add_argument(
        "--topology", type=Path, metavar="FILE", help="the gateway's settings (SF_GATEWAY_FILE)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", help="print Envoy's configuration and exit")
    instead.add_argument(
        "--render", type=Path, metavar="FILE", help="write Envoy's configuration to a file and exit"
    )
    instead.add_argument(
        "--drain", action="store_true", help="let the Envoy of this machine finish its calls, and exit"
    )


def run(args: argparse.Namespace) -> int:
    """Run Envoy until told to stop; 0 after that, 1 when it failed, 2 for a model nobody knows."""
    settings = load_settings()
    if args.topology is not None:
        settings = settings.model_copy(update={"gateway_file": args.topology})
    try:
        if args.drain:
            admin = Listener(host=LOOPBACK, port=settings.admin_port)
            asyncio.run(drain(admin, settings.drain_seconds, settings.grace_seconds))
            return 0
        topology = local_topology(settings, implemented())
        config = configuration(topology, settings)
        if args.print:
            print(config, end="")
            return 0
        if args.render is not None:
            args.render.write_text(config, encoding="utf-8")
            return 0
        return asyncio.run(_run(topology, config, settings.grace_seconds))
    except CatalogError as error:
        print(error, file=sys.stderr)
        return 2
    except (ChildEndedError, EnvoyError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def configuration(topology: Topology, settings: Settings) -> str:
    """Envoy's configuration file; raises CatalogError."""
    catalog = Catalog.load(settings.catalog_file, settings.model_aliases)
    return envoy_yaml(
        topology,
        catalog,
        max_items=settings.max_items,
        max_documents=settings.max_documents,
        max_classify_items=settings.max_classify_items,
        max_answer_tokens=settings.chat_max_answer_tokens,
    )


async def _run(topology: Topology, config: str, grace_seconds: float) -> int:
    stopping = stop_signal()
    with tempfile.TemporaryDirectory(prefix="search-foundation-") as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(config, encoding="utf-8")

        async def start() -> Envoy:
            return await Envoy.start(path, topology)

        envoy = Kept("Envoy", await start(), start)
        keeping = asyncio.create_task(envoy.keep())
        working = asyncio.create_task(_until_live(envoy))
        await asyncio.wait((keeping, stopping), return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        if keeping.done():
            stopping.cancel()
            keeping.result()
        await let_end(keeping)
        await envoy.stop(grace_seconds)
    return 0


async def _until_live(envoy: Kept[Envoy]) -> None:
    while True:
        if await envoy.child.live():
            envoy.works = True
            print("search-foundation: the gateway takes calls", file=sys.stderr, flush=True)
            return
        await asyncio.sleep(_POLL_SECONDS)

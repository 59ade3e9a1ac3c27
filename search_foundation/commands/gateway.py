"""``search-foundation gateway``: Envoy in front of the services."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateway import build
from gateway.endpoint_slices import EndpointSlices
from gateway.envoy import to_yaml
from gateway.local import LOOPBACK, local_topology
from gateway.process import Envoy, EnvoyError, drain
from gateway.topology import Listener, Topology
from gateway.xds import BOOTSTRAP, Publisher, follow
from search_foundation.capabilities import implemented
from search_foundation.keeping import ChildEndedError, Kept, let_end
from search_foundation.signals import stop_signal
from services.core.catalog import Catalog, CatalogError
from services.core.openapi.parts import Bounds
from services.core.settings import ConfigurationError, Settings, load_settings

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
        "--files",
        type=Path,
        metavar="FOLDER",
        help="write the configuration as files that a running Envoy takes changes from, and exit",
    )
    instead.add_argument(
        "--drain", action="store_true", help="let the Envoy of this machine finish its calls, and exit"
    )
    parser.add_argument(
        "--watch", action="store_true", help="with --files: go on, and write what changes in the topology"
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
        if args.files is not None:
            return asyncio.run(_write_files(args.files, settings, watch=args.watch))
        if args.print or args.render is not None:
            topology = local_topology(settings, implemented())
            config = to_yaml(configuration(topology, settings))
            if args.print:
                print(config, end="")
            else:
                args.render.write_text(config, encoding="utf-8")
            return 0
        return asyncio.run(_run(settings))
    except CatalogError as error:
        print(error, file=sys.stderr)
        return 2
    except (ChildEndedError, EnvoyError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def configuration(topology: Topology, settings: Settings) -> dict[str, Any]:
    """Envoy's configuration as plain data; raises CatalogError."""
    return build.configuration(
        topology,
        Catalog.load(settings.catalog_file, settings.model_aliases),
        bounds=Bounds(
            items=settings.max_items,
            documents=settings.max_documents,
            classify_items=settings.max_classify_items,
            answer_tokens=settings.chat_max_answer_tokens,
        ),
        default_model=settings.default_model,
    )


class _Source:
    """What configurations are made from: the files, and the endpoints of Services where pools name some."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topology = local_topology(settings, implemented())
        self.slices: EndpointSlices | None = None

    async def begin(self) -> None:
        """Learn of the endpoints, if there are Services; raises OSError where nobody tells of them."""
        if any(pool.service for pool in self.topology.pools):
            self.slices = EndpointSlices.of_pod()
            await self.slices.read()

    def read(self) -> dict[str, Any]:
        """Read the files and make the configuration; raises ConfigurationError or CatalogError."""
        self.topology = local_topology(self.settings, implemented())
        return configuration(self.resolved(), self.settings)

    def resolved(self) -> Topology:
        """The topology with the endpoints that there are now."""
        if self.slices is not None:
            return self.slices.resolve(self.topology)
        if any(pool.service for pool in self.topology.pools):
            raise ConfigurationError("A pool of a Service is the first one: restart the gateway.")
        return self.topology

    async def follow(self, publisher: Publisher) -> None:
        """Publish every change of the files and of the endpoints, for ever."""
        files = (self.settings.gateway_file, self.settings.catalog_file)
        tasks = [follow([path for path in files if path is not None], self.read, publisher)]
        if self.slices is not None:
            tasks.append(self._follow_endpoints(self.slices, publisher))
        await asyncio.gather(*tasks)

    async def _follow_endpoints(self, slices: EndpointSlices, publisher: Publisher) -> None:
        async for _ in slices.watch():
            publisher.put_endpoints(slices.resolve(self.topology))


async def _write_files(folder: Path, settings: Settings, *, watch: bool) -> int:
    stopping = stop_signal()
    source = _Source(settings)
    await source.begin()
    publisher = Publisher(folder, source.topology.admin)
    await publisher.publish(source.read())
    if watch:
        following = asyncio.create_task(source.follow(publisher))
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        following.cancel()
    stopping.cancel()
    return 0


async def _run(settings: Settings) -> int:
    stopping = stop_signal()
    source = _Source(settings)
    await source.begin()
    topology = source.topology
    with tempfile.TemporaryDirectory(prefix="search-foundation-") as name:
        folder = Path(name)
        publisher = Publisher(folder, topology.admin)
        await publisher.publish(source.read())

        async def start() -> Envoy:
            return await Envoy.start(folder / BOOTSTRAP, topology)

        envoy = Kept("Envoy", await start(), start)
        keeping = asyncio.create_task(envoy.keep())
        working = asyncio.create_task(_work(envoy, publisher, source))
        await asyncio.wait((keeping, working, stopping), return_when=asyncio.FIRST_COMPLETED)
        ended = next((task for task in (keeping, working) if task.done()), None)
        await let_end(working)
        if ended is not keeping:
            await let_end(keeping)
            await envoy.stop(settings.grace_seconds)
        stopping.cancel()
        if ended is not None:
            ended.result()
    return 0


async def _work(envoy: Kept[Envoy], publisher: Publisher, source: _Source) -> None:
    """Wait until Envoy takes calls, then follow the files for ever; ends by an error alone."""
    await _until_live(envoy)
    await source.follow(publisher)


async def _until_live(envoy: Kept[Envoy]) -> None:
    while True:
        if await envoy.child.live():
            envoy.works = True
            print("search-foundation: the gateway takes calls", file=sys.stderr, flush=True)
            return
        await asyncio.sleep(_POLL_SECONDS)

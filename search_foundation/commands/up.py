"""``search-foundation up``: the services and the gateway on this machine, until stopped."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from gateway.local import LOOPBACK, local_topology
from gateway.process import Envoy, EnvoyError
from gateway.topology import Address, Topology
from gateway.xds import BOOTSTRAP, Publisher
from search_foundation.arguments import port
from search_foundation.capabilities import implemented
from search_foundation.commands.gateway import configuration
from search_foundation.first_key import FirstKey, first_key
from search_foundation.keeping import ChildEndedError, Kept, keep_all, let_end
from search_foundation.local_ports import PORTS, settle_ports
from search_foundation.servable import NotServableError, require_servable
from search_foundation.services_process import ServicesProcess
from search_foundation.signals import stop_signal
from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Capability
from services.core.errors import ServiceError
from services.core.folders import data_folder
from services.core.settings import ConfigurationError, Settings, load_settings

_POLL_SECONDS = 0.1


class UpError(Exception):
    """It cannot start; the text is a sentence for the operator."""


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "up", help="run the services and the gateway on this machine"
    )
    names = ", ".join(implemented())
    parser.add_argument(
        "capabilities", nargs="*", type=_capability, metavar="CAPABILITY", help=f"all by default: {names}"
    )
    parser.add_argument("--host", help="address the gateway listens on (SF_HOST); loopback by default")
    parser.add_argument("--port", type=port, help="port of the gateway (SF_HTTP_PORT)")


def run(args: argparse.Namespace) -> int:
    """Run both until told to stop; 0 after that, 1 when one of them failed, 2 for wrong settings."""
    asked = {"host": args.host, "http_port": args.port}
    wanted = load_settings().model_copy(update={k: v for k, v in asked.items() if v is not None})
    settings = settle_ports(wanted)
    capabilities = tuple(dict.fromkeys(args.capabilities)) or implemented()
    try:
        require_servable(settings)
        data_folder(settings.data_dir)
        _tell_ports(wanted, settings)
        _say(f"starting, with {', '.join(settings.models)}")
        return asyncio.run(_up(settings, capabilities))
    except (CatalogError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 2
    except (ChildEndedError, EnvoyError, NotServableError, UpError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


async def _up(settings: Settings, capabilities: Sequence[Capability]) -> int:
    started = time.monotonic()
    stop = stop_signal()
    # Rendered first, so that wrong settings are told before anything runs.
    topology = _topology(settings, capabilities)
    rendered = configuration(topology, settings)

    async def start_services() -> ServicesProcess:
        return await ServicesProcess.start(settings, capabilities)

    services = Kept("services", await start_services(), start_services)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(services.stop, settings.grace_seconds)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="search-foundation-")))
        await Publisher(folder, topology.admin).publish(rendered)

        async def start_envoy() -> Envoy:
            return await Envoy.start(folder / BOOTSTRAP, topology)

        envoy = Kept("Envoy", await start_envoy(), start_envoy)
        stack.push_async_callback(envoy.stop, settings.grace_seconds)
        watching = asyncio.create_task(keep_all(services, envoy))
        stack.push_async_callback(let_end, watching)
        if await _first_of(watching, stop, asyncio.create_task(_until_ready(envoy.child))):
            services.works = envoy.works = True
            # Made only now: a start that fails would leave a key behind that nobody has seen.
            key = await _first_key(settings)
            _welcome(settings, topology, capabilities, key, time.monotonic() - started)
            await _first_of(watching, stop)
        _say("stopping, once the calls in flight are answered")
    return 0


def _topology(settings: Settings, capabilities: Sequence[Capability]) -> Topology:
    # No balancer stands before a laptop's gateway that would need time to look elsewhere.
    return local_topology(settings.model_copy(update={"drain_seconds": 0.0}), capabilities, services=LOOPBACK)


def _tell_ports(wanted: Settings, settled: Settings) -> None:
    for name in PORTS:
        asked, given = getattr(wanted, name), getattr(settled, name)
        if asked not in (0, given):
            _say(f"port {asked} is taken, {given} is used instead (SF_{name.upper()})")


def _say(sentence: str) -> None:
    print(f"search-foundation: {sentence}", file=sys.stderr, flush=True)


async def _first_key(settings: Settings) -> FirstKey | None:
    try:
        return await first_key(settings)
    except ServiceError as error:
        raise UpError(f"The database of keys cannot be used: {error}") from error


async def _first_of(watching: asyncio.Task[None], stop: asyncio.Task[Any], *aims: asyncio.Task[None]) -> bool:
    """Wait for a stop or an aim, and say whether it was the aim; raises what the watch or the aim raises."""
    await asyncio.wait((watching, stop, *aims), return_when=asyncio.FIRST_COMPLETED)
    for task in (watching, *aims):
        if task.done():
            task.result()
    return any(aim.done() for aim in aims) and not stop.done()


async def _until_ready(envoy: Envoy) -> None:
    while True:
        if await envoy.ready():
            return
        await asyncio.sleep(_POLL_SECONDS)


def _welcome(
    settings: Settings,
    topology: Topology,
    capabilities: Sequence[Capability],
    key: FirstKey | None,
    seconds: float,
) -> None:
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(topology.listener.host, topology.listener.host)
    scheme = "http" if topology.listener.tls is None else "https"
    url = f"{scheme}://{Address(host, topology.listener.port)}"
    models = ", ".join(settings.models)
    lines = [
        "",
        f"search-foundation is ready after {seconds:.1f} s, with {models}. Ctrl-C stops it.",
        "",
        _curl(url, settings, capabilities, key),
        "",
        f"  URL   {url}/v1",
        f"  gRPC  {Address(LOOPBACK, settings.grpc_port)}",
        *_about_key(settings, key),
        "",
    ]
    print("\n".join(lines), flush=True)


def _about_key(settings: Settings, key: FirstKey | None) -> list[str]:
    """The last lines, so that a new key stays in sight."""
    if not settings.auth:
        return ["  Key   none needed (SF_AUTH is false)"]
    if key is None:
        return ["  Key   one of those made before; 'search-foundation keys create' makes another"]
    kept = f"kept for you alone in {key.path}"
    return [f"  Key   {kept}"] if key.key is None else [f"        ({kept})", f"  Key   {key.key}"]


def _curl(url: str, settings: Settings, capabilities: Sequence[Capability], key: FirstKey | None) -> str:
    spec = Catalog.load(settings.catalog_file, settings.model_aliases).require(settings.models[0])
    path, body = "/v1/models", None
    if Capability.EMBED in capabilities and spec.supports(Capability.EMBED):
        path, body = "/v1/embeddings", {"model": spec.id, "input": "hello world"}
    elif Capability.RERANK in capabilities and spec.supports(Capability.RERANK):
        path, body = "/v1/rerank", {"model": spec.id, "query": "hello", "documents": ["hello world"]}
    words = ["curl", f"{url}{path}"]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = shlex.join(words)
    if settings.auth:
        # Not the key itself: the line ends in the histories of shells.
        secret = "$API_KEY" if key is None else f"$(cat {shlex.quote(str(key.path))})"
        line += f' -H "Authorization: Bearer {secret}"'
    return line


def _capability(text: str) -> Capability:
    known = implemented()
    if text not in known:
        raise argparse.ArgumentTypeError(f"'{text}' is none of: {', '.join(known)}")
    return Capability(text)

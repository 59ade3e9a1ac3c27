"""Several processes behind one port: a parent that starts, watches and stops them.

Workers load their models at the same time, open the port together once all are warm, and stop together: a
worker that ends by itself takes the group down, so that the port never leads to a part of it, health is true
of the whole, and whoever runs the process (an orchestrator, systemd) restarts it as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from services.core.serving.aggregate import merge
from services.core.serving.exposition import Exposition
from services.core.serving.ports import reserve_shared
from services.core.serving.server import Server, StopReason
from services.core.settings import Settings

logger = logging.getLogger(__name__)

_WARM = "warm"
_GO = "go"
_SERVING = "serving"
_SCRAPE_SECONDS = 5.0
_EXIT_SECONDS = 5.0

_HUNG_UP = (EOFError, ConnectionError)
"""What a pipe says when its other end is gone; a reset, when that left something unread."""

WorkerEntry = Callable[[Settings, Sequence[str], "WorkerLink"], None]
"""What a worker process runs; importable by name, and ended by ``SystemExit``."""

Announce = Callable[[int, int], None]
"""Called with the gRPC and the metrics port once every worker serves."""


class WorkerLink:
    """A worker's end of the pipe to its parent. Made by the parent, handed to the worker."""

    def __init__(self, pipe: Connection, metrics_path: Path) -> None:
        self.metrics_path = metrics_path
        self._pipe = pipe
        self._go: asyncio.Future[None] | None = None
        self._server: Server | None = None

    def attach(self) -> None:
        """Begin to listen to the parent; an interrupt from the terminal is the parent's to pass on."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        loop = asyncio.get_running_loop()
        self._go = loop.create_future()
        loop.add_reader(self._pipe.fileno(), self._hear)

    async def warm(self) -> None:
        """Say that the models are loaded, and wait until those of all workers are."""
        assert self._go is not None, "attach comes first"
        self._pipe.send(_WARM)
        await self._go

    def serving(self, server: Server) -> None:
        """Say that ``server`` serves; the parent may stop it from now on."""
        self._server = server
        self._pipe.send(_SERVING)

    def _hear(self) -> None:
        try:
            message = self._pipe.recv()
        except _HUNG_UP:  # the parent is gone, and with it whoever would restart this worker
            message = StopReason.TERMINATED
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        if message == _GO:
            assert self._go is not None
            self._go.set_result(None)
        elif self._server is not None:
            self._server.request_stop(StopReason(message))
        else:
            os._exit(0)  # still loading: nothing to finish, and a load cannot be cancelled


class _Worker:
    """The parent's view of a worker."""

    def __init__(self, number: int, pipe: Connection, process: SpawnProcess, metrics_path: Path) -> None:
        self.number = number
        self.pipe = pipe
        self.process = process
        self.metrics_path = metrics_path
        self.state = ""

    def tell(self, message: str) -> None:
        with contextlib.suppress(*_HUNG_UP):  # it has ended; its sentinel says so
            self.pipe.send(message)


class Supervisor:
    """Runs ``settings.workers`` processes of ``entry``."""

    def __init__(
        self, settings: Settings, entry: WorkerEntry, names: Sequence[str], announce: Announce
    ) -> None:
        self._settings = settings
        self._entry = entry
        self._names = names
        self._announce = announce
        self._workers: list[_Worker] = []
        self._stopping = False
        self._reason = StopReason.ENGINE_FAILED
        self._stop = asyncio.Event()
        self._ports = (0, 0)

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status: 0, or 1 when a worker ended by itself.

        Raises:
            PortInUseError: the gRPC or the metrics port is taken.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        with (
            reserve_shared(settings.host, settings.grpc_port) as held,
            tempfile.TemporaryDirectory(prefix="sf-workers-") as folder,
        ):
            port: int = held.getsockname()[1]
            exposition = Exposition(ready=self._all_serve, render=self._scrape)
            self._ports = (port, await exposition.start(settings.host, settings.metrics_port))
            for number, reason in (
                (signal.SIGTERM, StopReason.TERMINATED),
                (signal.SIGINT, StopReason.INTERRUPTED),
            ):
                loop.add_signal_handler(number, self._end, reason)
            try:
                for number in range(settings.workers):
                    self._start(number, port, Path(folder))
                await self._stop.wait()
                clean = await self._stop_workers()
            finally:
                await exposition.stop()
        return 0 if clean and self._reason is not StopReason.ENGINE_FAILED else 1

    def _start(self, number: int, port: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        path = folder / f"{number}.sock"
        settings = self._settings.model_copy(update={"grpc_port": port})
        process = context.Process(
            target=self._entry,
            args=(settings, self._names, WorkerLink(theirs, path)),
            name=f"worker-{number}",
        )
        process.start()
        theirs.close()
        worker = _Worker(number, ours, process, path)
        self._workers.append(worker)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._hear, worker)
        loop.add_reader(process.sentinel, self._on_exit, worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            worker.state = worker.pipe.recv()
        except _HUNG_UP:
            asyncio.get_running_loop().remove_reader(worker.pipe.fileno())
            return
        if all(each.state == _WARM for each in self._workers):
            for each in self._workers:
                each.tell(_GO)
        elif self._all_serve():
            self._announce(*self._ports)

    def _on_exit(self, worker: _Worker) -> None:
        asyncio.get_running_loop().remove_reader(worker.process.sentinel)
        worker.state = ""
        if not self._stopping:
            worker.process.join()
            logger.error("worker %d ended with status %s", worker.number, worker.process.exitcode)
            self._end(StopReason.ENGINE_FAILED)

    def _all_serve(self) -> bool:
        return not self._stopping and all(worker.state == _SERVING for worker in self._workers)

    def _end(self, reason: StopReason) -> None:
        if self._stopping:
            for worker in self._workers:
                worker.process.kill()
            return
        self._stopping = True
        self._reason = reason
        self._stop.set()

    async def _stop_workers(self) -> bool:
        """Stop all; True if each ended by itself, in time and with status 0."""
        for worker in self._workers:
            worker.tell(self._reason.value)
        limit = self._settings.grace_seconds + _EXIT_SECONDS
        waiting = [asyncio.to_thread(worker.process.join, limit) for worker in self._workers]
        await asyncio.gather(*waiting)
        for worker in self._workers:
            if worker.process.is_alive():
                logger.error("worker %d did not stop in time and is killed", worker.number)
                worker.process.kill()
                worker.process.join()
        return all(worker.process.exitcode == 0 for worker in self._workers)

    async def _scrape(self) -> bytes:
        pages = await asyncio.gather(*(_page(worker) for worker in self._workers))
        return merge({str(number): page for number, page in enumerate(pages) if page is not None})


async def _page(worker: _Worker) -> str | None:
    """Fetch a worker's metrics; None from one that has no socket yet, or no more."""
    try:
        async with asyncio.timeout(_SCRAPE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(worker.metrics_path)
            try:
                writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        logger.warning("no metrics from worker %d: %s", worker.number, error)
        return None
    return answer.partition(b"\r\n\r\n")[2].decode()

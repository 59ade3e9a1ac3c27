"""The engine for durable tasks, on DBOS: its workflows, queues and recovery, and what it leaves to its users.

Left to us: taking over the tasks of a worker that never comes back (see ``_take_over``), SQLite in WAL
mode, and deleting what is over. A task is one workflow without steps, since every task here is idempotent as
a whole. DBOS is one per process, and so is this.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dbos import (
    DBOS,
    DBOSConfig,
    DBOSPortableJSONSerializer,
    SetEnqueueOptions,
    SetWorkflowID,
)
from sqlalchemy import Engine as SqlEngine
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from services.batch.inputs import MAX_FETCHES
from services.batch.jobs import Handler, Task, TaskKind
from services.batch.metrics import TAKEOVERS
from services.batch.workers import Heartbeats, WorkerName
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import Database
from services.core.storage.address import database_url
from services.core.storage.sqlite import prepare

logger = logging.getLogger(__name__)

T = TypeVar("T")

_VERSION = "batch-1"
"""Of the tasks' form. Processes leave tasks of another version alone: it changes with their meaning only."""

_FILE = "batch-tasks.sqlite3"
_SQLITE_SECONDS = 30.0
"""For a lock that another process holds."""

_POLL_SECONDS: Mapping[TaskKind, float] = {
    TaskKind.PREPARE: 0.25,
    TaskKind.FETCH: 0.5,
    TaskKind.CHUNK: 0.15,
    TaskKind.NOTIFY: 1.0,
}
"""Between looks into a queue, each of which costs an idle process about 2 ms."""

_OF_ONE = 4
"""Tasks of one owner at a time that wait for somebody's server, of all that there are places for."""

_MISSED_BEATS = 6
_RETRY_SECONDS = 1.0
_TAKEN_AHEAD = 2
"""Tasks taken for each that may run, so that none has to wait for the next look into the queue."""

_WAITING = ["ENQUEUED", "DELAYED"]

_engine: DbosEngine | None = None


@DBOS.workflow(name="task", max_recovery_attempts=None)
async def _run(kind: str, job_id: str, model: str, owner: str, number: int) -> None:
    assert _engine is not None, "tasks are taken only after the start"
    await _outside(_engine.do(Task(TaskKind(kind), job_id, model, owner, number)))


class DbosEngine:
    """``JobEngine`` over SQLite in ``SF_DATA_DIR``, or the PostgreSQL of ``SF_DATABASE_URL``.

    It takes tasks of ``models``, ``concurrency`` chunks at a time.
    """

    def __init__(self, settings: Settings, database: Database, models: Sequence[str]) -> None:
        self._settings = settings
        self._models = models
        self._heartbeats = Heartbeats(database)
        self._name: WorkerName | None = None
        self._beat = settings.batch_heartbeat_seconds
        self._running: list[asyncio.Task[None]] = []
        self._handler: Handler | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._launched = False

    async def start(self, handler: Handler) -> None:
        """See ``JobEngine``. A database that is away now is tried again."""
        global _engine
        _engine = self
        self._handler = handler
        self._name = await asyncio.to_thread(WorkerName, self._settings)
        with contextlib.suppress(ServiceError):  # the database tells of its absence itself
            await self._heartbeats.beat(self._name.id)
        if not await self._launch(self._name.id):
            self._running.append(asyncio.create_task(self._launch_later(self._name.id)))
        self._running.append(asyncio.create_task(self._keep_alive(self._name.id)))

    async def submit(self, task: Task, delay: float = 0.0) -> None:
        """See ``JobEngine``."""
        self._check_launched()
        options = SetEnqueueOptions(queue_partition_key=task.owner, delay_seconds=delay or None)
        with SetWorkflowID(task.id), options:
            enqueue = DBOS.enqueue_workflow_async(
                _queue(task.kind, task.model),
                _run,
                task.kind.value,
                task.job_id,
                task.model,
                task.owner,
                task.number,
            )
            await self._told(enqueue)

    async def do(self, task: Task) -> None:
        """Do a task that was taken from a queue. One that is left undone is taken again."""
        running = asyncio.current_task()
        assert running is not None
        assert self._handler is not None
        self._tasks.add(running)
        try:
            if self._stopping.is_set():
                # To return would be to have done it.
                await asyncio.Event().wait()
            await self._handler(task)
        finally:
            self._tasks.discard(running)

    async def cancel(self, job_id: str) -> None:
        """See ``JobEngine``."""
        self._check_launched()
        for kind in (TaskKind.PREPARE, TaskKind.FETCH, TaskKind.CHUNK):
            waiting = await self._list(f"{job_id}:{kind}:", _WAITING)
            if waiting:
                await self._told(_outside(DBOS.cancel_workflows_async(waiting)))

    async def forget(self, job_id: str) -> None:
        """See ``JobEngine``."""
        self._check_launched()
        if stored := await self._list(f"{job_id}:", None):
            await self._told(_outside(DBOS.delete_workflows_async(stored)))

    async def stop(self, grace: float) -> None:
        """See ``JobEngine``."""
        self._stopping.set()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._launched:
            if tasks := list(self._tasks):
                await asyncio.wait(tasks, timeout=grace)
            self._launched = False
            await asyncio.to_thread(DBOS.destroy)
            _renew_executor()
            await _end(list(self._tasks))
        if self._name is not None:
            with contextlib.suppress(ServiceError):
                await self._heartbeats.leave(self._name.id)
            self._name.release()

    def _check_launched(self) -> None:
        if not self._launched:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SECONDS)

    async def _told(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except (SQLAlchemyError, OSError) as error:
            logger.error("cannot reach the tasks of batch jobs: %s", error)
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SECONDS) from error

    async def _list(self, prefix: str, status: list[str] | None) -> list[str]:
        listing = DBOS.list_workflows_async(
            workflow_id_prefix=prefix, status=status, load_input=False, load_output=False
        )
        return [found.workflow_id for found in await self._told(_outside(listing))]

    async def _launch(self, worker: str) -> bool:
        """Connect, migrate, take up what this worker had; false while the database is away."""
        try:
            config = _config(self._settings, worker)
            if "system_database_engine" not in config:
                # In another thread: building an index waits for every open transaction, and those of this
                # process end on the event loop, which the launch itself holds.
                await asyncio.to_thread(DBOS.migrate, str(config.get("system_database_url")))
            DBOS(config=config)
            DBOS.listen_queues([*(_queue(kind, model) for model in self._models for kind in TaskKind)])
            DBOS.launch()
            await self._register()
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            logger.error("batch jobs wait: their tasks' database is away: %s", error)
            DBOS.destroy()
            _renew_executor()
            return False
        self._launched = True
        return True

    async def _register(self) -> None:
        chunks = self._settings.batch_concurrency * _TAKEN_AHEAD
        places = {
            TaskKind.PREPARE: (32, _OF_ONE),
            TaskKind.FETCH: (MAX_FETCHES, _OF_ONE),
            TaskKind.CHUNK: (chunks, chunks),
            TaskKind.NOTIFY: (64, _OF_ONE),
        }
        for model in self._models:
            for kind, (taken, of_one) in places.items():
                await DBOS.register_queue_async(
                    _queue(kind, model),
                    worker_concurrency=taken,
                    # Owners share by lot: a task of each has the same chance.
                    partition_worker_concurrency=of_one,
                    polling_interval_sec=_POLL_SECONDS[kind],
                )

    async def _launch_later(self, worker: str) -> None:
        while not await self._stops_within(_RETRY_SECONDS):
            if await self._launch(worker):
                return

    async def _keep_alive(self, worker: str) -> None:
        while not await self._stops_within(self._beat):
            try:
                await self._heartbeats.beat(worker)
                await self._take_over(worker)
            except ServiceError as error:
                logger.warning("no sign of life could be given: %s", error)
            except Exception:
                logger.exception("looking after other workers failed")

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    async def _take_over(self, worker: str) -> None:
        """Put the tasks of workers that are late back into their queues."""
        late = self._beat * _MISSED_BEATS
        for other in await self._heartbeats.late(late):
            if other == worker or not self._launched:
                continue
            # A private name, but the only call that leaves alone what another worker has taken since.
            recover: Callable[[list[str]], list[Any]] = DBOS._recover_pending_workflows  # pyright: ignore[reportPrivateUsage]
            taken = await asyncio.to_thread(recover, [other])
            if taken:
                TAKEOVERS.inc()
                logger.warning("took over %d tasks of worker %s, which is silent", len(taken), other)
            else:
                await self._heartbeats.bury(other, late)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _queue(kind: TaskKind, model: str) -> str:
    return f"{kind}:{model}"


async def _outside(work: Coroutine[Any, Any, T]) -> T:
    """Run beside the workflow that calls: what it does there is not recorded as steps."""
    return await asyncio.get_running_loop().create_task(work, context=contextvars.Context())


def _renew_executor() -> None:
    """Give the event loop threads: DBOS puts its own in place when it starts and closes them when it ends."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())


def _config(settings: Settings, worker: str) -> DBOSConfig:
    config = DBOSConfig(
        name="search-foundation",
        executor_id=worker,
        application_version=_VERSION,
        # Not pickle, the default: whoever writes to the database would run code here.
        serializer=DBOSPortableJSONSerializer(),
        log_level="ERROR",
    )
    url = database_url(settings)
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        file = Path(url.database).with_name(_FILE)
        prepare(file, _SQLITE_SECONDS, create=True)
        tasks = URL.create("sqlite", database=str(file))
        config["system_database_engine"] = _sqlite(tasks)
    else:
        tasks = url.set(drivername="postgresql", query={})
        config["sys_db_pool_size"] = 8
    config["system_database_url"] = tasks.render_as_string(hide_password=False)
    return config


def _sqlite(url: URL) -> SqlEngine:
    engine = create_engine(url, connect_args={"timeout": _SQLITE_SECONDS, "isolation_level": "IMMEDIATE"})

    def connect(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    event.listen(engine, "connect", connect)
    return engine

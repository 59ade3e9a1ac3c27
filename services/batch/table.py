"""Jobs and their chunks in the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from sqlalchemy import (
    RowMapping,
    and_,
    case,
    column,
    delete,
    func,
    insert,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from services.batch.quotas import Holdings
from services.batch.schema import RUNNING, File, JobForm, State, job_file_id
from services.core.access.booking import book
from services.core.storage import Database

_JOB = (
    *("id", "owner", "model", "task", "dimensions", "normalized", "input_url", "input_name"),
    *("webhook_url", "webhook_tries", "webhook_ended", "state", "error", "base_url", "joined"),
    *("created_at", "completed_at", "expires_at"),
    *("chunks", "total", "completed", "failed", "total_tokens"),
    *("tier", "input_bytes", "file_bytes", "form", "input_file", "metadata"),
)
_CHUNK = (
    *("job_id", "number", "first", "lines", "start", "length", "faults", "place"),
    *("attempts", "tries", "done", "name", "output_bytes", "error_bytes"),
)
FILES = table(
    "batch_files",
    *map(column, ("id", "owner", "purpose", "filename", "bytes", "created_at", "expires_at", "job_id")),
)
_JOBS = table("batch_jobs", *map(column, _JOB))
_CHUNKS = table("batch_chunks", *map(column, _CHUNK))
_J = _JOBS.c
_C = _CHUNKS.c
_RUNNING = [state.value for state in RUNNING]

Check = Callable[[Holdings], None]
"""Looks at what an owner has; what it raises undoes the change."""


def _anything(usage: Holdings) -> None:
    del usage


OUTPUT_PURPOSE = "batch_output"
"""Of the files that jobs make, of either kind."""

UNPLANNED = -1
"""Chunks of a job whose lines have not been counted."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A row of ``batch_files``; one with a ``job_id`` is a file that the job made."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A row of ``batch_jobs``; times are seconds since the epoch."""

    id: str
    owner: str
    model: str
    task: str | None
    dimensions: int | None
    normalized: bool
    input_url: str | None
    webhook_url: str | None
    created_at: float
    expires_at: float
    base_url: str
    state: State = State.PENDING
    error: str | None = None
    joined: bool = False
    input_name: str | None = None
    completed_at: float | None = None
    webhook_tries: int = 0
    webhook_ended: bool = False
    chunks: int = UNPLANNED
    total: int = 0
    completed: int = 0
    failed: int = 0
    total_tokens: int = 0
    tier: str = ""
    input_bytes: int = 0
    file_bytes: int = 0
    form: JobForm = JobForm.OWN
    input_file: str | None = None
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a chunk lies in the input: ``lines`` lines from number ``first``, ``length`` bytes at ``start``.

    ``faults`` are lines, from 0, that only a look at the whole input finds wrong. ``place`` is that of the
    first line in the file, where blank lines count, from 1.
    """

    first: int
    lines: int
    start: int
    length: int
    faults: Mapping[int, str]
    place: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A planned chunk at its n-th attempt; ``tries`` counts deaths of workers by range of lines."""

    plan: Plan
    attempts: int
    tries: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ChunkFiles:
    """The two files of a chunk that is done."""

    number: int
    name: str
    output_bytes: int
    error_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkOutcome:
    """What a chunk came to."""

    part: ChunkFiles
    completed: int
    failed: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is left to do: unfinished jobs without and with lines done, lines, when the oldest was made."""

    queued: int = 0
    running: int = 0
    lines: int = 0
    oldest: float | None = None


class JobTable:
    """Jobs as rows; every method raises SERVICE_UNAVAILABLE while the database is away.

    Each change is one transaction, committed when the method returns.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, job: BatchJob, check: Check = _anything) -> None:
        """Store a new job, unless ``check`` of what its owner has already raises."""
        row = {name: getattr(job, name) for name in _JOB}
        row |= {"state": job.state.value, "form": job.form.value}
        async with self._database.write() as connection:
            await _let_owner_in_alone(connection, job.owner)
            check(await _usage(connection, job.owner))
            await connection.execute(insert(_JOBS).values(row))

    async def add_file(self, file: UploadedFile, check: Check) -> None:
        """Note an uploaded file, unless ``check`` of what its owner has already raises."""
        async with self._database.write() as connection:
            await _let_owner_in_alone(connection, file.owner)
            check(await _usage(connection, file.owner))
            await connection.execute(insert(FILES).values(asdict(file)))

    async def drop_file(self, file: UploadedFile) -> None:
        """Note that a file's content is gone."""
        async with self._database.write() as connection:
            gone = await connection.execute(delete(FILES).where(FILES.c.id == file.id))
            if gone.rowcount and file.job_id is not None:
                change = update(_JOBS).where(_J.id == file.job_id)
                await connection.execute(change.values(file_bytes=_J.file_bytes - file.bytes))

    async def usage(self, key_id: str) -> Holdings:
        """Sum up what an owner has stored and unfinished."""
        async with self._database.read() as connection:
            return await _usage(connection, key_id)

    async def find(self, job_id: str) -> BatchJob | None:
        """Look a job up."""
        async with self._database.read() as connection:
            row = (await connection.execute(select(*_J).where(_J.id == job_id))).mappings().one_or_none()
        return None if row is None else _job(row)

    async def list(self, key_id: str, limit: int) -> list[BatchJob]:
        """Give an owner's jobs, newest first."""
        query = select(*_J).where(_J.owner == key_id).order_by(_J.created_at.desc(), _J.id).limit(limit)
        async with self._database.read() as connection:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

    async def stored_bytes(self) -> int:
        """Sum up the bytes of all owners."""
        async with self._database.read() as connection:
            jobs = select(func.sum(_J.input_bytes + _J.file_bytes))
            uploads = select(func.sum(FILES.c.bytes)).where(FILES.c.job_id.is_(None))
            sums = [(await connection.execute(query)).scalar_one() for query in (jobs, uploads)]
            return sum(int(figure or 0) for figure in sums)

    async def plan(
        self,
        job: BatchJob,
        plans: Sequence[Plan],
        input_name: str | None,
        input_bytes: int,
        check: Check = _anything,
    ) -> bool:
        """Store the chunks of a job that waits for them; false when it waits no more.

        ``check`` raises when it is too much beside what its owner has already without this job.
        """
        job_id = job.id
        rows = [
            {
                "job_id": job_id,
                "number": number,
                "first": plan.first,
                "lines": plan.lines,
                "start": plan.start,
                "length": plan.length,
                "faults": orjson.dumps(plan.faults, option=orjson.OPT_NON_STR_KEYS).decode(),
                "place": plan.place,
                "attempts": 0,
                "tries": "{}",
                "done": False,
                "output_bytes": 0,
                "error_bytes": 0,
            }
            for number, plan in enumerate(plans)
        ]
        total = sum(plan.lines for plan in plans)
        change = update(_JOBS).where(_J.id == job_id, _J.state == State.PENDING.value, _J.chunks == UNPLANNED)
        change = change.values(
            chunks=len(plans),
            total=total,
            state=State.PROCESSING.value,
            input_name=input_name,
            input_bytes=input_bytes,
        )
        async with self._database.write() as connection:
            await _let_owner_in_alone(connection, job.owner)
            check(await _usage(connection, job.owner, but=job_id))
            if not (await connection.execute(change)).rowcount:
                return False
            await connection.execute(insert(_CHUNKS), rows)
        return True

    async def has_open_chunk(self, job_id: str) -> bool:
        """Whether a chunk is not done."""
        query = select(_C.number).where(_C.job_id == job_id, _C.done.is_(False)).limit(1)
        async with self._database.read() as connection:
            return (await connection.execute(query)).first() is not None

    async def open_chunks(self, job_id: str) -> list[int]:
        """Give the numbers of the chunks that are not done."""
        query = select(_C.number).where(_C.job_id == job_id, _C.done.is_(False)).order_by(_C.number)
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def begin_chunk(self, job_id: str, number: int) -> Chunk | None:
        """Count an attempt; None when the chunk is done already."""
        here = and_(_C.job_id == job_id, _C.number == number)
        change = update(_CHUNKS).where(here, _C.done.is_(False)).values(attempts=_C.attempts + 1)
        async with self._database.write() as connection:
            row = (await connection.execute(change.returning(*_C))).mappings().one_or_none()
        if row is None:
            return None
        faults = {int(place): fault for place, fault in orjson.loads(row["faults"]).items()}
        plan = Plan(row["first"], row["lines"], row["start"], row["length"], faults, row["place"])
        return Chunk(plan, row["attempts"], orjson.loads(row["tries"]))

    async def give_back_chunk(self, job_id: str, number: int, tries: Mapping[str, int]) -> None:
        """Take an attempt back that ended in good order without a result."""
        here = and_(_C.job_id == job_id, _C.number == number, _C.attempts > 0)
        async with self._database.write() as connection:
            values = {"attempts": _C.attempts - 1, "tries": orjson.dumps(tries).decode()}
            await connection.execute(update(_CHUNKS).where(here).values(values))

    async def note_tries(self, job_id: str, number: int, tries: Mapping[str, int]) -> None:
        """Store what a worker is about to try."""
        change = update(_CHUNKS).where(_C.job_id == job_id, _C.number == number)
        async with self._database.write() as connection:
            await connection.execute(change.values(tries=orjson.dumps(tries).decode()))

    async def end_chunk(self, job: BatchJob, outcome: ChunkOutcome) -> bool:
        """Store the result of a chunk and book its tokens, once; false when it does not count any more."""
        part = outcome.part
        here = and_(_C.job_id == job.id, _C.number == part.number, _C.done.is_(False))
        chunk = update(_CHUNKS).where(here)
        chunk = chunk.values(
            done=True, name=part.name, output_bytes=part.output_bytes, error_bytes=part.error_bytes
        )
        counts = update(_JOBS).where(_J.id == job.id, _J.state == State.PROCESSING.value)
        counts = counts.values(
            completed=_J.completed + outcome.completed,
            failed=_J.failed + outcome.failed,
            total_tokens=_J.total_tokens + outcome.tokens,
            file_bytes=_J.file_bytes + part.output_bytes + part.error_bytes,
        )
        async with self._database.write() as connection:
            # The job first: its row puts the ends of its chunks in turn.
            if not await _is_running(connection, job.id):
                return False
            if not (await connection.execute(chunk)).rowcount:
                return False
            await connection.execute(counts)
            if outcome.tokens:
                await book(connection, job.owner, outcome.tokens)
        return True

    async def end(self, job_id: str, state: State, now: float, *, error: str | None = None) -> bool:
        """End a job that has not ended; false when it has."""
        change = update(_JOBS).where(_J.id == job_id, _J.state.in_(_RUNNING))
        async with self._database.write() as connection:
            values = {"state": state.value, "completed_at": now, "error": error, "input_bytes": 0}
            ended = bool((await connection.execute(change.values(values))).rowcount)
            if ended:
                await _list_files(connection, job_id, now)
        return ended

    async def join(self, job_id: str) -> None:
        """Note that the parts of a job's files have been made into one object each."""
        async with self._database.write() as connection:
            await connection.execute(update(_JOBS).where(_J.id == job_id).values(joined=True))

    async def parts(self, job_id: str) -> list[ChunkFiles]:
        """Give the files of the chunks that are done, in order."""
        query = select(_C.number, _C.name, _C.output_bytes, _C.error_bytes)
        query = query.where(_C.job_id == job_id, _C.done.is_(True)).order_by(_C.number)
        async with self._database.read() as connection:
            return [ChunkFiles(**row) for row in (await connection.execute(query)).mappings()]

    async def tried_webhook(self, job_id: str, *, ended: bool) -> int:
        """Count an attempt to tell a job's end; gives the number of attempts."""
        change = update(_JOBS).where(_J.id == job_id)
        change = change.values(webhook_tries=_J.webhook_tries + 1, webhook_ended=ended)
        async with self._database.write() as connection:
            return (await connection.execute(change.returning(_J.webhook_tries))).scalar_one()

    async def stalled(self, before: float, limit: int) -> list[BatchJob]:
        """Give jobs made before a time that may have lost a task: not planned, or webhook not told."""
        waiting = and_(_J.state == State.PENDING.value, _J.chunks == UNPLANNED)
        untold = and_(_J.webhook_url.is_not(None), _J.webhook_ended.is_(False), _J.completed_at < before)
        query = select(*_J).where(_J.created_at < before, or_(waiting, untold)).limit(limit)
        async with self._database.read() as connection:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

    async def wanted(self, job_ids: Iterable[str]) -> set[str]:
        """Give those of some jobs that go on or came to their end line by line."""
        states = [*_RUNNING, State.COMPLETED.value]
        whole = and_(_J.state == State.FAILED.value, _J.completed + _J.failed == _J.total, _J.chunks > 0)
        query = select(_J.id).where(_J.id.in_(list(job_ids)), or_(_J.state.in_(states), whole))
        async with self._database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def page(self, key_id: str, form: JobForm, after: str | None, limit: int) -> list[BatchJob]:
        """Give an owner's jobs of a form, newest first, behind the job ``after``."""
        query = select(*_J).where(_J.owner == key_id, _J.form == form.value)
        if after is not None:
            last = select(_J.created_at).where(_J.id == after).scalar_subquery()
            query = query.where(or_(_J.created_at < last, and_(_J.created_at == last, _J.id > after)))
        query = query.order_by(_J.created_at.desc(), _J.id).limit(limit)
        async with self._database.read() as connection:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

    async def uses(self, file_id: str) -> str | None:
        """Give the id of an unfinished job that is made from a file."""
        query = select(_J.id).where(_J.input_file == file_id, _J.state.in_(_RUNNING)).limit(1)
        async with self._database.read() as connection:
            return (await connection.execute(query)).scalar_one_or_none()

    async def backlog(self) -> Backlog:
        """Sum up the unfinished jobs of all owners."""
        done = _J.completed + _J.failed
        queued = case((done == 0, 1), else_=0)
        query = select(
            func.count(), func.sum(queued), func.sum(_J.total - done), func.min(_J.created_at)
        ).where(_J.state.in_(_RUNNING))
        async with self._database.read() as connection:
            jobs, waiting, lines, oldest = (await connection.execute(query)).one()
        return Backlog(waiting or 0, jobs - (waiting or 0), lines or 0, oldest)

    async def expired(self, now: float, limit: int) -> list[BatchJob]:
        """Give jobs whose time is over and whose files are still there."""
        query = select(*_J).where(_J.expires_at <= now, _J.state != State.EXPIRED.value)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(_J.expires_at).limit(limit))
            return [_job(row) for row in rows.mappings()]

    async def expire(self, job_id: str, now: float) -> None:
        """Note that a job's files are gone."""
        completed_at = func.coalesce(_J.completed_at, now)
        change = update(_JOBS).where(_J.id == job_id)
        async with self._database.write() as connection:
            await connection.execute(delete(_CHUNKS).where(_C.job_id == job_id))
            await connection.execute(delete(FILES).where(FILES.c.job_id == job_id))
            values: dict[str, Any] = {
                "state": State.EXPIRED.value,
                "completed_at": completed_at,
                "input_bytes": 0,
                "file_bytes": 0,
            }
            await connection.execute(change.values(values))

    async def forget(self, before: float) -> None:
        """Delete jobs that expired before a time."""
        change = delete(_JOBS).where(_J.state == State.EXPIRED.value, _J.expires_at < before)
        async with self._database.write() as connection:
            await connection.execute(change)


async def _usage(connection: AsyncConnection, key_id: str, but: str = "") -> Holdings:
    running = _J.state.in_(_RUNNING)
    untold = and_(_J.webhook_url.is_not(None), _J.webhook_ended.is_(False), _J.state != State.EXPIRED.value)
    query = select(
        func.sum(case((running, 1), else_=0)),
        func.sum(case((running, _J.total - _J.completed - _J.failed), else_=0)),
        func.sum(case((untold, 1), else_=0)),
        func.sum(_J.input_bytes + _J.file_bytes),
    ).where(_J.owner == key_id, _J.id != but)
    jobs, lines, webhooks, stored = (int(figure or 0) for figure in (await connection.execute(query)).one())
    # What jobs have made is counted with them.
    uploads = select(func.sum(FILES.c.bytes)).where(FILES.c.owner == key_id, FILES.c.job_id.is_(None))
    uploaded = int((await connection.execute(uploads)).scalar_one() or 0)
    return Holdings(jobs, lines, webhooks, stored + uploaded)


async def _list_files(connection: AsyncConnection, job_id: str, now: float) -> None:
    """List the files of a job that has ended among its owner's, if it was made from one of those."""
    job = _job((await connection.execute(select(*_J).where(_J.id == job_id))).mappings().one())
    if job.form is not JobForm.OPENAI:
        return
    sums = select(func.sum(_C.output_bytes), func.sum(_C.error_bytes))
    sums = sums.where(_C.job_id == job_id, _C.done.is_(True))
    for file, length in zip(File, (await connection.execute(sums)).one(), strict=True):
        if length:
            row = UploadedFile(
                job_file_id(job_id, file),
                job.owner,
                OUTPUT_PURPOSE,
                f"{job_id}_{file}.jsonl",
                int(length),
                now,
                job.expires_at,
                job_id,
            )
            await connection.execute(insert(FILES).values(asdict(row)))


async def _let_owner_in_alone(connection: AsyncConnection, key_id: str) -> None:
    """Make others of one owner wait for this transaction, or two could both be the last that is allowed.

    On SQLite there is only one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(hashtext(:room), hashtext(:owner))")
        await connection.execute(lock, {"room": "batch", "owner": key_id})


async def _is_running(connection: AsyncConnection, job_id: str) -> bool:
    query = select(_J.state).where(_J.id == job_id).with_for_update()
    return (await connection.execute(query)).scalar_one_or_none() == State.PROCESSING.value


def _job(row: RowMapping) -> BatchJob:
    booleans = {name: bool(row[name]) for name in ("normalized", "joined", "webhook_ended")}
    values: dict[str, Any] = {
        **row,
        **booleans,
        "state": State(row["state"]),
        "form": JobForm(row["form"]),
    }
    return BatchJob(**values)

"""Several workers on one PostgreSQL: one dies, freezes or leaves, or the database does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from searchfoundation.v1 import batch_pb2

from tests.batch import expected
from tests.batch.conftest import Expect
from tests.batch.process import MODEL, Client, Worker
from tests.servers import PostgresServer, remove, shared_postgres, start_postgres

Make = Callable[..., Worker]

LINES = 240
QUICK: Mapping[str, str] = {"SF_BATCH_HEARTBEAT_SECONDS": "0.3"}


@dataclass(frozen=True)
class Form:
    """A large job and the default heartbeat, or a small one and a quick heart."""

    lines: int
    settings: Mapping[str, str]


FORMS = pytest.mark.parametrize(
    "form",
    [
        pytest.param(Form(LINES, QUICK), id="short"),
        pytest.param(Form(5_000, {}), id="long", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
_QUEUED = "searchfoundation_queue_items"
_DROPPED = "searchfoundation_dropped_items_total"
_DONE = "searchfoundation_batch_lines_total"


def _pair(workers: Make, url: str, **settings: str) -> tuple[Worker, Worker]:
    first = workers("first", SF_DATABASE_URL=url, **settings)
    second = workers("second", SF_DATABASE_URL=url, **settings)
    first.wait_until_serving()
    second.wait_until_serving()
    return first, second


def _begun(client: Client, lines: int = LINES) -> str:
    """Make a job that both work on."""
    job = client.submit(input=expected.lines(expected.texts(lines)))
    client.wait_for_lines(job, 40)
    return job


def _freeze_at_work(worker: Worker) -> None:
    """Freeze a worker at a moment at which it holds tasks."""
    query = "SELECT count(*) FROM dbos.workflow_status WHERE status = 'PENDING' AND executor_id = %s"
    with psycopg.connect(worker.settings["SF_DATABASE_URL"], autocommit=True) as connection:
        for _ in range(200):
            worker.signal(signal.SIGSTOP)
            row = connection.execute(query, [f"{worker.name}-0"]).fetchone()
            if row is not None and row[0]:
                return
            worker.signal(signal.SIGCONT)
            time.sleep(0.02)
    raise AssertionError("it had nothing to do")


def _as_expected(client: Client, job: str, expect: Expect, lines: int = LINES) -> None:
    done = client.wait(job, 120.0 if lines == LINES else 900.0)
    assert (done.succeeded, done.failed, done.total) == (lines, 0, lines)
    assert client.download(job) == expect(job, lines)


@FORMS
def test_one_is_killed_and_never_comes_back(workers: Make, expect: Expect, form: Form) -> None:
    first, second = _pair(workers, shared_postgres().new_database(), **form.settings)
    with Client(first) as client:
        job = _begun(client, form.lines)
    _freeze_at_work(first)
    first.kill()
    died = time.monotonic()
    with Client(second) as client:
        _until(lambda: "took over" in second.text(), 60)
        print(f"taken over {time.monotonic() - died:.1f} s after the death")
        _as_expected(client, job, expect, form.lines)
        print(f"done {time.monotonic() - died:.1f} s after the death")
    assert second.figure("searchfoundation_batch_takeovers_total") == 1


@FORMS
def test_one_is_frozen_and_wakes_after_the_takeover(workers: Make, expect: Expect, form: Form) -> None:
    first, second = _pair(workers, shared_postgres().new_database(), **form.settings)
    with Client(first) as client:
        job = _begun(client, form.lines)
    _freeze_at_work(first)
    with Client(second) as client:
        _until(lambda: "took over" in second.text(), 60)
        first.signal(signal.SIGCONT)
        _as_expected(client, job, expect, form.lines)
        time.sleep(1)  # for what the late one may still do
        assert client.download(job) == expect(job, form.lines)


@FORMS
def test_one_leaves_in_good_order(workers: Make, expect: Expect, form: Form) -> None:
    first, second = _pair(workers, shared_postgres().new_database(), **form.settings)
    with Client(first) as client:
        job = _begun(client, form.lines)
    first.signal(signal.SIGTERM)
    first.process.join(20)
    assert first.process.exitcode == 0, first.text()
    with Client(second) as client:
        _as_expected(client, job, expect, form.lines)


def test_cancelling_at_one_interrupts_the_other(workers: Make) -> None:
    settings = {"SF_BATCH_CHUNK_TOKENS": "1000000", "SF_BATCH_CONCURRENCY": "1", **QUICK}
    first, second = _pair(workers, shared_postgres().new_database(), **settings)
    given = expected.lines([" ".join(expected.WORDS * 9)] * 1_536)

    def interrupted(worker: Worker) -> bool:
        # What was not embedded of its chunk left the queue instead of being worked off.
        return worker.figure(_DROPPED, model=MODEL, reason="cancelled") > 0

    # A chunk may have left the queue when the word comes: more jobs are made until each was caught at work.
    deadline = time.monotonic() + 240
    with Client(first) as client:
        while not all(map(interrupted, (first, second))):
            assert time.monotonic() < deadline
            job = client.submit(input=given)
            _until(lambda: all(each.figure(_QUEUED, model=MODEL) > 0 for each in (first, second)), 120)
            client.typed.CancelBatch(batch_pb2.CancelBatchRequest(id=job))
            _until(lambda: all(each.figure(_QUEUED, model=MODEL) == 0 for each in (first, second)), 120)


def test_workers_of_one_process_group_share_a_job_without_a_server(workers: Make, expect: Expect) -> None:
    group = workers(SF_WORKERS="2")
    with Client(group) as client:
        _as_expected(client, client.submit(input=expected.lines(expected.texts(LINES))), expect)
    done = [group.figure(_DONE, model=MODEL, outcome="completed", worker=str(n)) for n in range(2)]
    assert sum(done) == LINES
    assert sorted(path.name for path in (group.folder / "data" / "workers").glob("*.lock")) == [
        "worker-0.lock",
        "worker-1.lock",
    ]


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL of one's own, to be stopped."""
    server = start_postgres()
    yield server
    remove(server)


@pytest.mark.parametrize(
    "seconds", [pytest.param(1.0, id="short"), pytest.param(5.0, id="long", marks=pytest.mark.soak)]
)
def test_the_database_is_away(server: PostgresServer, workers: Make, expect: Expect, seconds: float) -> None:
    worker = workers("only", SF_DATABASE_URL=server.new_database(), **QUICK)
    with Client(worker) as client:
        job = _begun(client)
        server.stop()
        time.sleep(seconds)
        server.start()
        _as_expected(client, job, expect)


@pytest.mark.parametrize(
    "seconds", [pytest.param(2.0, id="short"), pytest.param(30.0, id="long", marks=pytest.mark.soak)]
)
def test_the_database_is_frozen(
    server: PostgresServer, workers: Make, expect: Expect, seconds: float
) -> None:
    """No connection breaks, and nobody answers on any."""
    settings = {"SF_DATABASE_TIMEOUT_SECONDS": "1", **QUICK}
    worker = workers("only", SF_DATABASE_URL=server.new_database(), **settings)
    with Client(worker) as client:
        job = _begun(client)
        with _frozen(server):
            time.sleep(seconds)
        _as_expected(client, job, expect)


def test_the_database_comes_after_the_worker(server: PostgresServer, workers: Make, expect: Expect) -> None:
    url = server.new_database()
    server.stop()
    worker = workers("only", SF_DATABASE_URL=url)
    worker.wait_until_serving()
    server.start()
    with Client(worker) as client:
        _as_expected(client, client.submit(input=expected.lines(expected.texts(LINES))), expect)


@contextmanager
def _frozen(server: PostgresServer) -> Iterator[None]:
    """Stop a server and the processes that it has for each connection, first the one that makes them."""
    assert server.process is not None
    pid = server.process.pid
    os.kill(pid, signal.SIGSTOP)
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for each in children:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in (*children, pid):
            os.kill(each, signal.SIGCONT)


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""Several workers on one PostgreSQL: one dies, freezes or leaves, or the database does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.batch import expected
from tests.batch.conftest import Expect
from tests.batch.process import Client, Worker
from tests.servers import PostgresServer, remove, shared_postgres, start_postgres

Make = Callable[..., Worker]

LINES = 400
QUICK = {"SF_BATCH_HEARTBEAT_SECONDS": "0.3"}


@pytest.fixture
def pair(workers: Make) -> tuple[Worker, Worker]:
    """Two workers with quick hearts."""
    return _pair(workers, shared_postgres().new_database(), **QUICK)


def _pair(workers: Make, url: str, **settings: str) -> tuple[Worker, Worker]:
    first = workers("first", SF_DATABASE_URL=url, **settings)
    second = workers("second", SF_DATABASE_URL=url, **settings)
    first.wait_until_serving()
    second.wait_until_serving()
    return first, second


def _begun(client: Client) -> str:
    """Make a job that both work on."""
    job = client.submit(input=expected.lines(expected.texts(LINES)))
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


def _as_expected(client: Client, job: str, expect: Expect, seconds: float = 60.0) -> None:
    done = client.wait(job, seconds)
    assert (done.succeeded, done.failed, done.total) == (LINES, 0, LINES)
    assert client.download(job) == expect(job, LINES)


def test_one_is_killed_and_never_comes_back(pair: tuple[Worker, Worker], expect: Expect) -> None:
    first, second = pair
    with Client(first) as client:
        job = _begun(client)
    _freeze_at_work(first)
    first.kill()
    with Client(second) as client:
        _as_expected(client, job, expect)
    assert "took over" in second.text()
    assert second.figure("searchfoundation_batch_takeovers_total") == 1


@pytest.mark.soak
def test_takeover_within_a_minute_with_default_settings(workers: Make, expect: Expect) -> None:
    first, second = _pair(workers, shared_postgres().new_database())
    with Client(first) as client:
        job = _begun(client)
    _freeze_at_work(first)
    first.kill()
    with Client(second) as client:
        _as_expected(client, job, expect, 60.0)
    assert "took over" in second.text()


def test_one_is_frozen_and_wakes_after_the_takeover(pair: tuple[Worker, Worker], expect: Expect) -> None:
    first, second = pair
    with Client(first) as client:
        job = _begun(client)
    _freeze_at_work(first)
    with Client(second) as client:
        _until(lambda: "took over" in second.text())
        first.signal(signal.SIGCONT)
        _as_expected(client, job, expect)
        time.sleep(1)  # for what the late one may still do
        assert client.download(job) == expect(job, LINES)


def test_one_leaves_in_good_order(pair: tuple[Worker, Worker], expect: Expect) -> None:
    first, second = pair
    with Client(first) as client:
        job = _begun(client)
    first.signal(signal.SIGTERM)
    first.process.join(20)
    assert first.process.exitcode == 0, first.text()
    with Client(second) as client:
        _as_expected(client, job, expect)


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
        _as_expected(client, job, expect, 90.0)


def test_the_database_comes_after_the_worker(server: PostgresServer, workers: Make, expect: Expect) -> None:
    url = server.new_database()
    server.stop()
    worker = workers("only", SF_DATABASE_URL=url)
    worker.wait_until_serving()
    server.start()
    with Client(worker) as client:
        _as_expected(client, client.submit(input=expected.lines(expected.texts(LINES))), expect)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""Processes and servers die at random moments; the output is the expected file all the same."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import orjson
import pytest
from searchfoundation.v1 import batch_pb2

from services.batch.embedding import STRIKES
from tests.batch import expected
from tests.batch.conftest import Expect
from tests.batch.process import POISON, Client, Worker

Make = Callable[..., Worker]


def _survive(worker: Worker, expect: Expect, *, lines: int, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(lines)))
        killed = 0
        while killed < kills and client.status(job).completed.seconds == 0:
            time.sleep(chance.uniform(0.05, 0.6))
            worker.kill()
            worker.start()
            killed += 1
        done = client.wait(job, 900)
        assert killed == kills
        assert (done.succeeded, done.failed, done.total) == (lines, 0, lines)
        output = client.download(job)
        assert output == expect(job, lines)
        tokens = [
            orjson.loads(line)["response"]["body"]["usage"]["total_tokens"] for line in output.splitlines()
        ]
        assert sum(tokens) == done.total_tokens


def test_the_only_worker_is_killed_again_and_again(workers: Make, expect: Expect) -> None:
    _survive(workers(), expect, lines=500, kills=5, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_only_worker_is_killed_twenty_times(workers: Make, expect: Expect) -> None:
    _survive(workers(), expect, lines=5_000, kills=20, seed=2)


@pytest.mark.parametrize(
    "seconds", [pytest.param(7.0, id="short"), pytest.param(40.0, id="long", marks=pytest.mark.soak)]
)
def test_another_process_holds_the_locks_of_sqlite(
    workers: Make, expect: Expect, tmp_path: Path, seconds: float
) -> None:
    """Both files stay locked for longer than is waited for a lock; the job goes on afterwards."""
    worker = workers()
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(500)))
        client.wait_for_lines(job, 1)
        with ExitStack() as locks:
            for file in sorted((tmp_path / "data").glob("*.sqlite3")):
                connection = locks.enter_context(closing(sqlite3.connect(file, timeout=60)))
                connection.execute("BEGIN IMMEDIATE")
            done = client.status(job).succeeded
            assert done < 500
            time.sleep(seconds)
            assert client.status(job).succeeded == done
            with pytest.raises(grpc.RpcError) as caught:
                client.submit(input=expected.lines(expected.texts(1)), once=True)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert client.wait(job).succeeded == 500
        assert client.download(job) == expect(job, 500)


def test_a_line_that_kills_is_left_out(workers: Make, expect: Expect) -> None:
    worker = workers(poisoned=True)
    given = expected.lines(expected.texts(60))
    given[23]["body"]["input"] = POISON
    with Client(worker) as client:
        job = client.submit(input=given)
        deaths = 0
        while not _ended(client, job):
            worker.process.join(0.1)
            if worker.process.exitcode is not None:
                assert worker.process.exitcode == 9
                deaths += 1
                worker.start()
        done = client.wait(job)
        assert (done.succeeded, done.failed) == (59, 1), client.download(job, batch_pb2.BATCH_FILE_ERRORS)
        assert client.download(job) == expect(job, 60, (23,))
        assert b'"line-23"' in client.download(job, batch_pb2.BATCH_FILE_ERRORS)
        # Once with its chunk, once with its group, and then alone.
        assert deaths == 2 + STRIKES


def _ended(client: Client, job: str) -> bool:
    """Whether the job has ended; False also while the worker is away."""
    try:
        return client.typed.GetBatch(batch_pb2.GetBatchRequest(id=job), timeout=1).completed.seconds > 0
    except grpc.RpcError:
        return False

"""Processes and servers die at random moments; the output is the expected file all the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc
import pytest
from searchfoundation.v1 import batch_pb2

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
        done = client.wait(job, 300)
        assert killed == kills
        assert (done.succeeded, done.failed, done.total) == (lines, 0, lines)
        assert client.download(job) == expect(job, lines)


def test_the_only_worker_is_killed_again_and_again(workers: Make, expect: Expect) -> None:
    _survive(workers(), expect, lines=500, kills=5, seed=1)


@pytest.mark.soak
def test_the_only_worker_is_killed_twenty_times(workers: Make, expect: Expect) -> None:
    _survive(workers(), expect, lines=5_000, kills=20, seed=2)


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
        # Once with its chunk, once with its group, and alone as often as three times.
        assert deaths == 5


def _ended(client: Client, job: str) -> bool:
    """Whether the job has ended; False also while the worker is away."""
    try:
        return client.typed.GetBatch(batch_pb2.GetBatchRequest(id=job), timeout=1).completed.seconds > 0
    except grpc.RpcError:
        return False

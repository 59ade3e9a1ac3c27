"""No room left on the disk, and a bucket that refuses: jobs wait, and their files are whole in the end."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from google.api import httpbody_pb2
from searchfoundation.v1 import batch_pb2

from tests.batch import expected
from tests.batch.bucket import bucket
from tests.batch.conftest import Expect
from tests.batch.process import Client, Worker

Make = Callable[..., Worker]

_SIZE = 24 << 20
_LINES = 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of few bytes where workers keep everything."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Take all room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    yield
    filler.unlink()


def _until_said(worker: Worker, *words: str) -> None:
    deadline = time.monotonic() + 60
    while not any(each in worker.log.read_text() for each in words):
        assert time.monotonic() < deadline, worker.text()
        time.sleep(0.05)


def _takes_no_job(client: Client) -> None:
    body = httpbody_pb2.HttpBody(data=b'{"model": "all-MiniLM-L6-v2", "input": [{}]}')
    with pytest.raises(grpc.RpcError) as caught:
        client.rest.CreateBatch(body, timeout=180)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_full_disk_holds_jobs_up_and_breaks_none(
    small_disk: Path, workers: Make, expect: Expect, dies: bool
) -> None:
    worker = workers()
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(_LINES)))
        client.wait_for_lines(job, 1)
        with _full(small_disk):
            _until_said(worker, "is full", "No space left")
            assert client.status(job).state == batch_pb2.BATCH_STATE_PROCESSING
            assert client.status(job).succeeded < _LINES
            _takes_no_job(client)
            if dies:
                worker.kill()
                worker.start()
        worker.wait_until_serving()
        done = client.wait(job)
        assert (done.succeeded, done.failed, done.total) == (_LINES, 0, _LINES)
        assert client.download(job) == expect(job, _LINES)
        another = client.submit(input=expected.lines(expected.texts(20)))
        client.wait(another)
        assert client.download(another) == expect(another, 20)


def test_a_job_is_cancelled_on_a_full_disk_and_makes_room(small_disk: Path, workers: Make) -> None:
    worker = workers()
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(_LINES)) + _padding())
        client.wait_for_lines(job, 1)
        with _full(small_disk):
            _until_said(worker, "is full", "No space left")
            with pytest.raises(grpc.RpcError) as caught:
                client.submit(input=expected.lines(expected.texts(1)), once=True)
            assert (
                "The server's disk is nearly full, so it takes no new batch jobs." in caught.value.details()
            )
            cancelled = client.cancel(job)
            assert cancelled.state == batch_pb2.BATCH_STATE_CANCELLED
            assert not list((small_disk / "objects" / "batches" / job).glob("input*"))
            assert len(client.download(job).splitlines()) == cancelled.succeeded
        another = client.submit(input=expected.lines(expected.texts(1)))
        assert client.wait(another).succeeded == 1


def _padding() -> list[dict[str, object]]:
    """Lines that are refused and take room in the input."""
    return [{"custom_id": f"padding-{n}", "body": {"padding": "x" * 100_000}} for n in range(20)]


@pytest.mark.parametrize("status", [403, 503])
def test_a_bucket_that_refuses_holds_jobs_up_and_breaks_none(
    workers: Make, expect: Expect, status: int
) -> None:
    with bucket() as front:
        worker = workers(
            SF_OBJECT_STORE="s3://files/jobs",
            AWS_ENDPOINT=front.url,
            AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test",
            AWS_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
        )
        with Client(worker) as client:
            job = client.submit(input=expected.lines(expected.texts(_LINES)))
            client.wait_for_lines(job, 1)
            front.refusal = status
            _until_said(worker, "waits for the object store")
            _takes_no_job(client)
            assert client.status(job).succeeded < _LINES
            front.refusal = None
            done = client.wait(job)
            assert (done.succeeded, done.failed, done.total) == (_LINES, 0, _LINES)
            assert client.download(job) == expect(job, _LINES)
            assert httpx.get(done.output_url, timeout=100).content == expect(job, _LINES)

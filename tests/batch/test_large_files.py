"""Files larger than a process may grow: they are streamed, however slowly they are read."""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from searchfoundation.v1 import batch_pb2

from tests.batch import expected
from tests.batch.process import Client, Worker

_SIZE = 400 << 20
_GROWTH = 64 << 20


def test_a_large_output_is_sent_in_little_memory(workers: Callable[..., Worker], tmp_path: Path) -> None:
    worker = workers()
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(3)))
        client.wait(job)
        _enlarge(tmp_path / "data", job)
        client.download(job, offset=_SIZE - 1000)
        before = most = _resident(worker)
        total = 0
        for number, piece in enumerate(client.typed.DownloadBatch(batch_pb2.DownloadBatchRequest(id=job))):
            total += len(piece.data)
            if number < 3:
                time.sleep(0.5)
            if number % 50 < 3:
                most = max(most, _resident(worker))
        assert total == _SIZE
        assert most - before < _GROWTH


def test_an_output_that_lost_its_end_is_not_taken_for_whole(
    workers: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = workers()
    with Client(worker) as client:
        job = client.submit(input=expected.lines(expected.texts(3)))
        client.wait(job)
        whole = client.download(job)
        _enlarge(tmp_path / "data", job, noted=len(whole) + 1, size=len(whole))
        with pytest.raises(grpc.RpcError) as caught:
            client.download(job)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def _enlarge(folder: Path, job: str, noted: int = _SIZE, size: int = _SIZE) -> None:
    """Make the only part of a job's output as large as a job of many lines would have it, and note it so."""
    (part,) = (folder / "objects" / "batches" / job / "parts").glob("*.output.jsonl")
    with part.open("r+b") as file:
        file.truncate(size)
    with sqlite3.connect(folder / "search-foundation.sqlite3") as database:
        database.execute("UPDATE batch_chunks SET output_bytes = ? WHERE job_id = ?", (noted, job))
    database.close()


def _resident(worker: Worker) -> int:
    """Bytes that the process holds now."""
    return int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

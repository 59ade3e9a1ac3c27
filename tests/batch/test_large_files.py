"""Files larger than a process may grow: they are streamed, however slowly they are read."""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

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


def _enlarge(folder: Path, job: str) -> None:
    """Make the only part of a job's output as large as a job of many lines would have it."""
    (part,) = (folder / "objects" / "batches" / job / "parts").glob("*.output.jsonl")
    with part.open("r+b") as file:
        file.truncate(_SIZE)
    with sqlite3.connect(folder / "search-foundation.sqlite3") as database:
        database.execute("UPDATE batch_chunks SET output_bytes = ? WHERE job_id = ?", (_SIZE, job))
    database.close()


def _resident(worker: Worker) -> int:
    """Bytes that the process holds now."""
    return int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

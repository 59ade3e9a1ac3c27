"""What /metrics of a running service tells of jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from searchfoundation.v1 import batch_pb2

from tests.batch import expected
from tests.batch.process import MODEL, Client, Worker

_JOBS = "searchfoundation_batch_jobs"
_LINES = "searchfoundation_batch_lines_total"


class _Receiver(BaseHTTPRequestHandler):
    """Is not ready for the first event, and takes the next."""

    calls = 0

    def do_POST(self) -> None:
        type(self).calls += 1
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503 if self.calls == 1 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_backlog_and_what_became_of_it(workers: Callable[..., Worker], receiver: str) -> None:
    networks = {"SF_FETCH_ALLOW_NETWORKS": '["127.0.0.1/32"]'}
    worker = workers(SF_BATCH_CHUNK_TOKENS="40", SF_BATCH_CONCURRENCY="1", **networks)
    given = [*expected.lines(expected.texts(1_500)), {"custom_id": "bad"}]
    with Client(worker) as client:
        job = client.submit(input=given)
        _until(lambda: worker.figure(_JOBS, status="running") == 1)
        assert worker.figure(_JOBS, status="queued") == 0
        assert 0 < worker.figure("searchfoundation_batch_backlog_lines") < 1_501
        assert 0 < worker.figure("searchfoundation_batch_backlog_age_seconds") < 60
        client.typed.CancelBatch(batch_pb2.CancelBatchRequest(id=job))
        small = client.submit(input=given[-11:], webhook_url=receiver)
        assert (client.wait(small).succeeded, client.wait(small).failed) == (10, 1)
        _until(lambda: worker.figure("searchfoundation_batch_webhooks_total", outcome="delivered") == 1)
        assert worker.figure("searchfoundation_batch_webhooks_total", outcome="retry") == 1
        assert worker.figure(_LINES, model=MODEL, outcome="failed") == 1
        done = worker.figure(_LINES, model=MODEL, outcome="completed")
        assert done == client.status(job).succeeded + 10
        chunks = worker.figure("searchfoundation_batch_chunk_seconds_count", model=MODEL)
        assert 1 < chunks <= done
        _until(lambda: worker.figure(_JOBS, status="running") == 0)
        assert worker.figure("searchfoundation_batch_backlog_lines") == 0
        assert worker.figure("searchfoundation_batch_backlog_age_seconds") == 0

"""The end of a job is told though the receiver is away for a while and the worker dies meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from search_foundation.cli import main
from tests.batch import expected
from tests.batch.process import Client, Worker
from tests.servers import free_port
from tests.threaded_http import serving

Make = Callable[..., Worker]


@dataclass
class Receiver:
    """Answers news with ``status``, and keeps them with what was answered."""

    status: int = 503
    news: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)

    def taken(self) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for status, headers, body in self.news if status == 204]


@contextmanager
def listening(port: int, receiver: Receiver) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = receiver.status
            self.send_response(status)
            self.end_headers()
            receiver.news.append((status, headers, body))

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with serving(Handler, port):
        yield


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "away", [0.0, pytest.param(30.0, marks=[pytest.mark.soak, pytest.mark.timeout(240)])]
)
def test_news_outlive_the_worker_and_the_receiver(
    workers: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    away: float,
) -> None:
    worker = workers(SF_FETCH_ALLOW_NETWORKS='["127.0.0.1/32"]')
    port, receiver = free_port(), Receiver()
    with Client(worker) as client:
        given = expected.lines(expected.texts(3))
        job = client.submit(input=given, webhook_url=f"http://127.0.0.1:{port}/news")
        client.wait(job)
        with listening(port, receiver):
            until(lambda: receiver.news)
            worker.kill()
        worker.start()
        worker.wait_until_serving()
        time.sleep(away)
        receiver.status = 204
        with listening(port, receiver):
            until(receiver.taken)
            until(lambda: "(delivered)" in worker.text())
            time.sleep(1.0)  # the next attempt would come now
    monkeypatch.setenv("SF_DATA_DIR", str(tmp_path / "data"))
    assert main(["webhooks", "secret"]) == 0
    secret = capsys.readouterr().out.strip()
    ((headers, body),) = receiver.taken()
    told = Webhook(secret).verify(body, headers)
    assert (told["batch_id"], told["status"], told["stats"]["completed"]) == (job, "completed", 3)
    event = f"evt_{job.removeprefix('batch_')}_completed"
    assert {headers["webhook-id"] for _, headers, _ in receiver.news} == {event}

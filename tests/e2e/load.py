"""Callers that keep calling until told to stop, and note every answer."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tests.stack import MODEL, wait_for

REFUSED = "connection refused"
LOST = "lost"


@dataclass
class Load:
    """Threads in a closed loop over one kept connection each, which embed ``text``, one or a list.

    A caller waits ``pause`` seconds after a call that was not answered 200.
    ``outcomes`` counts statuses, REFUSED connections and LOST calls, which were sent over a connection on
    which nothing came back. A new connection that is reset counts as refused: the port was closed while it
    waited in the kernel's queue, and nobody has read its call. ``taken`` has the seconds of the calls that
    were answered 200, in the order of their answers.
    """

    port: int
    callers: int
    headers: dict[str, str] = field(default_factory=dict)
    text: str | list[str] = "a text of about ten words to embed once more"
    pause: float = 0.0
    outcomes: Counter[int | str] = field(default_factory=Counter)
    failures: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.callers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(120)

    def stop(self) -> None:
        """Let each caller end with the call that it is making."""
        self._stop.set()

    def wait_for(self, outcome: int | str, number: int) -> None:
        """Wait until so many more calls than now have had an outcome."""
        number += self.outcomes[outcome]
        wait_for(lambda: self.outcomes[outcome] >= number)

    def _run(self) -> None:
        connection = self._connection()
        body = json.dumps({"model": MODEL, "input": self.text})
        headers = {"content-type": "application/json", **self.headers}
        while not self._stop.is_set():
            fresh = connection.sock is None
            try:
                if fresh:
                    connection.connect()
            except OSError:
                self.outcomes[REFUSED] += 1
                time.sleep(0.02)
                continue
            try:
                began = time.monotonic()
                connection.request("POST", "/v1/embeddings", body, headers)
                response = connection.getresponse()
                answer = response.read()
                if response.status == 200:
                    self.taken.append(time.monotonic() - began)
                self._note(response.status, dict(response.getheaders()), answer)
                if response.status != 200:
                    self._stop.wait(self.pause)
            except (OSError, http.client.HTTPException) as error:
                queued = fresh and isinstance(error, (ConnectionResetError, BrokenPipeError))
                queued = queued and not isinstance(error, http.client.RemoteDisconnected)
                self.outcomes[REFUSED if queued else LOST] += 1
                connection.close()
        connection.close()

    def _note(self, status: int, headers: dict[str, str], answer: bytes) -> None:
        self.outcomes[status] += 1
        if status != 200:
            fields = {name.lower(): value for name, value in headers.items()}
            self.failures.append((status, fields, answer))

    def _connection(self) -> Any:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

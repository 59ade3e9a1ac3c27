"""Steady load on the gateway, with a record of every call."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Sent:
    """One call: when it began, and its status (0 when the connection broke)."""

    began: float
    status: int


class Load:
    """Clients that call one after the other, each over a connection it keeps; a context manager."""

    def __init__(self, address: str, key: str, *, clients: int = 6, text: str = "hello world") -> None:
        self.calls: list[Sent] = []
        self._address = address
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self._body = json.dumps({"model": "all-MiniLM-L6-v2", "input": text})
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Sent]:
        """Calls that were not answered with 200."""
        return [sent for sent in self.calls if sent.status != 200]

    def wait_for(self, more: int) -> None:
        """Wait until so many further calls ended."""
        until = len(self.calls) + more
        while len(self.calls) < until:
            time.sleep(0.01)

    def _call(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=100)
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", "/v1/embeddings", self._body, self._headers)
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            self.calls.append(Sent(began, status))
        connection.close()

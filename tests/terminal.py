"""A command whose standard streams are a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from gateway.child import ends_with_parent


class Terminal:
    """Runs a command until the end of the ``with`` block; ``shown`` is what it has written so far."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.shown = bytearray()
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(100)
        self._reader.join()
        os.close(self._ours)

    def text(self) -> str:
        return self.shown.decode(errors="replace").replace("\r\n", "\n")

    def _read(self) -> None:
        try:
            while piece := os.read(self._ours, 65536):
                self.shown.extend(piece)
        except OSError:  # how Linux says that the other side is closed
            return

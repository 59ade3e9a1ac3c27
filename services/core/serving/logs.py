"""Logs on standard error: JSON, every line with the request id of its call, or short lines for a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from functools import lru_cache
from typing import Any

import orjson
from prometheus_client import Counter

from services.core.call import current_call

_FLUSH_SECONDS = 0.1
_CLOSE_SECONDS = 2.0
_BACKLOG = 50

DROPPED_LINES = Counter(
    "searchfoundation_access_log_dropped_lines", "Lines given up because standard error is not read."
)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``time``, ``level``, ``logger``, ``message``, ``request_id``, ``stack``.

    Extra attributes given as ``extra={"fields": {...}}`` are added to the object.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Render the record as one line."""
        line: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current_call.get(None)
        if call is not None:
            line["request_id"] = call.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(_clean(line), default=str).decode()


class TextFormatter(logging.Formatter):
    """The time, the level unless it is ``info``, and the message; for whoever sits before a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Render the record as a line, and its stack below it."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        fields: dict[str, Any] = getattr(record, "fields", {})
        told = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{_clock(record.created)}  {level}{record.getMessage()}{told}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line.encode("utf-8", "replace").decode()


def _is_no_header(record: logging.LogRecord) -> bool:
    """Whether a record is not gRPC's stack over a header that is no UTF-8: a caller's, which nobody reads."""
    return not str(record.msg).startswith("Invalid encoding on")


def configure(level: str, *, text: bool = False) -> None:
    """Send all of Python's logging to standard error, of at least ``level``: JSON lines, or short ones."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_header)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)


def timestamp(seconds: float) -> str:
    """UTC time in RFC 3339 with milliseconds."""
    whole = int(seconds)
    return f"{_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


def _clock(seconds: float) -> str:
    """Local time of day, as a reader's watch has it."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


@lru_cache(maxsize=2)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


class AccessLog:
    """One line per call, written in bundles and by a thread, so that a slow reader of the log slows no call.

    Lines are dropped, and counted, once a reader is ``_BACKLOG`` bundles behind.
    """

    def __init__(self, *, text: bool = False) -> None:
        self._text = text
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._bundles: queue.Queue[bytes | None] = queue.Queue(_BACKLOG)
        self._writer = threading.Thread(target=self._write_bundles, name="access-log", daemon=True)
        self._writer.start()

    def write(self, fields: dict[str, Any]) -> None:
        """Queue a line; it is on standard error within a tenth of a second."""
        if self._text:
            self._lines.append(_short(fields).encode())
        else:
            line = {"time": timestamp(time.time()), "level": "info", "logger": "access", **fields}
            self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)

    def close(self) -> None:
        """Write what is queued; gives up on a reader that does not read."""
        self._flush()
        with contextlib.suppress(queue.Full):
            self._bundles.put_nowait(None)
            self._writer.join(_CLOSE_SECONDS)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            try:
                self._bundles.put_nowait(b"".join(self._lines))
            except queue.Full:
                DROPPED_LINES.inc(len(self._lines))
            self._lines.clear()

    def _write_bundles(self) -> None:
        while (bundle := self._bundles.get()) is not None:
            sys.stderr.write(bundle.decode())
            sys.stderr.flush()


def _short(fields: dict[str, Any]) -> str:
    """What a reader wants of a call: its method, model, end, tokens and milliseconds."""
    words = [
        fields["method"].rpartition("/")[2],
        fields["model"],
        fields["code"],
        f"{fields['tokens']} tokens" if fields["tokens"] else "",
        f"{fields['seconds'] * 1000:.0f} ms",
    ]
    return f"{_clock(time.time())}  {'  '.join(word for word in words if word)}\n"


def _clean(line: dict[str, Any]) -> dict[str, Any]:
    """Replace what UTF-8 cannot carry: a message may quote a caller's lone surrogates."""
    return {
        key: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for key, value in line.items()
    }

"""A process that decodes what callers send and can be lost: ``python -m services.core.media.decoder``.

It reads requests from standard input and writes answers to standard output, until there are no more. A
first header says that it is ready. A request is a header of JSON and the file; an answer is a header for
each picture, frame or sound with its numbers, then a last header. All lengths are four bytes, little
endian. Before pixels are decoded a header says how many bytes of them there will be, and a byte is waited
for that lets them be. The argument is its memory in bytes, a request says how many seconds of CPU its file
may take: what exceeds those is ended by the kernel.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from services.core.media import pictures
from services.core.media.pictures import Piece, Refused


def main(memory_bytes: int) -> None:
    """Serve until standard input ends."""
    _bound(memory_bytes)
    _silence()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, {"ready": True})
    while (head := _read(requests)) is not None:
        data = _read(requests)
        if data is None:
            return
        rules = json.loads(head)
        # Its default is to end the process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, rules["cpu_seconds"])
        _answer(requests, answers, data, rules)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _bound(memory_bytes: int) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _silence() -> None:
    """Keep the remarks of C libraries on callers' files out of the log, and our own tracebacks in it."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _answer(requests: BinaryIO, answers: BinaryIO, data: bytes, rules: Mapping[str, Any]) -> None:
    try:
        for piece in _decoded(data, rules):
            _write(answers, piece.head, piece.data)
            if "needs" in piece.head and not requests.read(1):
                return
    except Refused as refused:
        _write(answers, {"refused": str(refused)})
    except MemoryError:
        _write(answers, {"refused": "it needs too much memory to decode"})
    else:
        _write(answers, {"done": True})


def _decoded(data: bytes, rules: Mapping[str, Any]) -> Iterator[Piece]:
    if rules["kind"] in ("image", "pdf"):
        return pictures.decode(data, pictures.Rules.read(rules))
    try:
        # With the first of them: a process that only sees pictures does without FFmpeg.
        from services.core.media import films
    except ImportError as error:
        raise Refused(
            "sound and films are not read by this server; its operator can install 'search-foundation[media]'"
        ) from error
    return films.decode(data, films.Rules.read(rules))


def _read(source: BinaryIO) -> bytes | None:
    length = source.read(4)
    if len(length) < 4:
        return None
    return source.read(int.from_bytes(length, "little"))


def _write(target: BinaryIO, head: Mapping[str, Any], pixels: bytes = b"") -> None:
    text = json.dumps(head).encode()
    target.write(len(text).to_bytes(4, "little") + text + len(pixels).to_bytes(4, "little"))
    target.write(pixels)
    target.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""A process that decodes what callers send and can be lost: ``python -m services.core.media.decoder``.

It reads requests from standard input and writes answers to standard output, until there are no more. A first
header says that it is ready. A request is a header of JSON and the file; an answer is a header for each
picture with its pixels, then a last header. All lengths are four bytes, little endian. The arguments are its
memory in bytes, and the seconds of CPU that one file may take: what exceeds those is ended by the kernel.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from services.core.media.pictures import Refused, Rules, decode


def main(memory_bytes: int, cpu_seconds: float) -> None:
    """Serve until standard input ends."""
    _bound(memory_bytes)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, {"ready": True})
    while (head := _read(requests)) is not None:
        data = _read(requests)
        if data is None:
            return
        # Its default is to end the process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        _answer(answers, data, Rules.read(json.loads(head)))
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _bound(memory_bytes: int) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _answer(answers: BinaryIO, data: bytes, rules: Rules) -> None:
    try:
        for width, height, *source, pixels in decode(data, rules):
            _write(answers, {"size": [width, height], "source": source}, pixels)
    except Refused as refused:
        _write(answers, {"refused": str(refused)})
    except MemoryError:
        _write(answers, {"refused": "it needs too much memory to decode"})
    else:
        _write(answers, {"done": True})


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
    main(int(sys.argv[1]), float(sys.argv[2]))

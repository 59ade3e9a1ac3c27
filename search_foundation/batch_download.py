"""A file of a job brought here whole, over as many connections as it takes."""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import httpx

from search_foundation.batch_client import BatchClient, CallError

_TRIES = 6
_OVERLAP = 4096

Progress = Callable[[int, int | None], None]
"""Is told how many bytes are here, and of how many, if the server says it."""


def part_of(target: Path, batch_id: str, file: str) -> Path:
    """Name the file that holds what came so far; it belongs to one job's one file."""
    safe = "".join(mark if mark.isalnum() or mark in "-_" else "_" for mark in batch_id)
    return target.with_name(f"{target.name}.{safe}.{file}.part")


def download(client: BatchClient, batch_id: str, file: str, target: Path, progress: Progress) -> int:
    """Bring ``file`` to ``target`` and return its bytes; ``target`` appears only when it is whole.

    Goes on where a broken download stopped, in this run or an earlier one. Raises CallError, OSError.
    """
    part = part_of(target, batch_id, file)
    with part.open("ab+") as content, _kept_if_filled(part, content):
        _until_whole(lambda: _go_on(client, batch_id, file, content, progress))
        content.flush()
        os.fsync(content.fileno())
        size = content.tell()
    part.replace(target)
    return size


@contextmanager
def _kept_if_filled(part: Path, content: BinaryIO) -> Generator[None]:
    """Hold the file for this process alone; after a failure leave it only if there is something in it."""
    fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    except BaseException:
        content.flush()
        if content.seek(0, os.SEEK_END) == 0:
            part.unlink(missing_ok=True)
        raise


def to_stdout(client: BatchClient, batch_id: str, file: str) -> None:
    """Write ``file`` to standard output as it comes, going on after a break; raises CallError, OSError."""
    written = 0

    def go_on() -> None:
        nonlocal written
        with client.download(batch_id, file, written) as answer:
            for piece in answer.iter_bytes():
                written += sys.stdout.buffer.write(piece)

    _until_whole(go_on)
    sys.stdout.buffer.flush()


def _until_whole(go_on: Callable[[], None]) -> None:
    """Try again what the server or the way to it broke off, a few times."""
    for left in reversed(range(_TRIES)):
        try:
            go_on()
            return
        except CallError as error:
            if not error.temporary or left == 0:
                raise
            time.sleep(2.0 ** (_TRIES - 1 - left) / 4)


def _go_on(client: BatchClient, batch_id: str, file: str, content: BinaryIO, progress: Progress) -> None:
    size = content.seek(0, os.SEEK_END)
    # The last bytes are asked for once more: if they differ, what is here is not the start of that file,
    # or the server has sent it from its beginning.
    overlap = min(size, _OVERLAP)
    content.seek(size - overlap)
    known = content.read(overlap)
    with client.download(batch_id, file, size - overlap) as answer:
        pieces = answer.iter_bytes()
        seen, rest = _take(pieces, overlap)
        if seen == known:
            _append(content, rest, pieces, progress, _total(answer, size - overlap))
            return
    content.truncate(0)
    with client.download(batch_id, file, 0) as answer:
        _append(content, b"", answer.iter_bytes(), progress, _total(answer, 0))


def _total(answer: httpx.Response, left_out: int) -> int | None:
    """Give the length of the whole file, if the answer tells it."""
    length = answer.headers.get("content-length", "")
    return left_out + int(length) if length.isdigit() and "content-encoding" not in answer.headers else None


def _take(pieces: Iterator[bytes], size: int) -> tuple[bytes, bytes]:
    """Split off the first ``size`` bytes, or all if there are fewer."""
    head = b""
    while len(head) < size:
        piece = next(pieces, None)
        if piece is None:
            break
        head += piece
    return head[:size], head[size:]


def _append(
    content: BinaryIO, first: bytes, rest: Iterator[bytes], progress: Progress, total: int | None
) -> None:
    size = content.seek(0, os.SEEK_END)
    progress(size, total)
    for piece in itertools.chain((first,), rest):
        size += content.write(piece)
        progress(size, total)

"""Fetching a snapshot of the hub into a folder: resumed after a break, verified, and all or nothing.

``huggingface_hub`` throws a half-fetched file away when its process ends, which hurts with files of
gigabytes; here the bytes stay and the next run goes on behind them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

import httpx

from services.core.catalog.hub import PullError, RemoteFile, Snapshot, refusal

RECORD = ".search-foundation.json"

_TRIES = 5
_PAUSE = 0.5
_CHUNK = 1 << 20
_RESTART = frozenset({HTTPStatus.OK, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

Progress = Callable[[RemoteFile, int], None]
"""Told a file and how many bytes of it are there now."""


class _BusyError(Exception):
    """The hub answered with a status that passes."""


def pull(snapshot: Snapshot, target: Path, http: httpx.Client, progress: Progress, *, replace: bool) -> bool:
    """Fetch ``snapshot`` into the folder ``target``, which appears only once every file is verified.

    What an interrupted run left is taken up again. Answers False if ``target`` already is that snapshot. A
    ``target`` that no pull made is kept unless ``replace``. Raises ``PullError``.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(f".{target.name}.lock")):
            return _pull(snapshot, target, http, progress, replace=replace)
    except OSError as error:
        raise PullError(f"Cannot write to {error.filename or target}: {error.strerror or error}.") from error


def pulled_commit(folder: Path) -> str:
    """The commit that a finished pull left in ``folder``; empty if none did."""
    try:
        return str(json.loads((folder / RECORD).read_bytes())["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _pull(snapshot: Snapshot, target: Path, http: httpx.Client, progress: Progress, *, replace: bool) -> bool:
    if target.exists() and not replace:
        if pulled_commit(target) == snapshot.commit:
            return False
        if not pulled_commit(target):
            raise PullError(f"{target} is there and was not made by a pull; --force replaces it.")
    partial = target.with_name(f".{target.name}.{snapshot.commit[:12]}.partial")
    _check_space(snapshot, partial)
    for file in snapshot.files:
        _fetch(snapshot, file, partial / file.name, http, progress)
    (partial / RECORD).write_text(json.dumps(asdict(snapshot), indent=1), "utf-8")
    _swap(partial, target)
    return True


def _check_space(snapshot: Snapshot, partial: Path) -> None:
    partial.mkdir(exist_ok=True)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = snapshot.size - there, shutil.disk_usage(partial).free
    if needed > free:
        raise PullError(f"{partial.parent} has {free:,} bytes free, the files need {needed:,} more.")


def _swap(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    for leftover in (old, *target.parent.glob(f".{target.name}.*.partial")):
        if leftover.exists():
            shutil.rmtree(leftover)


@contextmanager
def _alone(lock: Path) -> Generator[None]:
    """Wait until no other process pulls the same model."""
    with lock.open("wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(snapshot: Snapshot, file: RemoteFile, path: Path, http: httpx.Client, progress: Progress) -> None:
    if path.is_file() and _digest(path, file) == file.digest:
        progress(file, file.size)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.touch()
    _complete(snapshot.url(file), file, part, http, progress)
    if part.stat().st_size != file.size or _digest(part, file) != file.digest:
        part.unlink()
        raise PullError(
            f"{file.name} of {snapshot.repository} is not what the hub says it holds (size or hash differ) "
            "and was deleted. Run the command again; if that repeats, do not use this repository."
        )
    part.rename(path)


def _complete(url: str, file: RemoteFile, part: Path, http: httpx.Client, progress: Progress) -> None:
    """Append to ``part`` until it is as long as ``file``; give up after some tries without a new byte."""
    tries, problem = 0, ""
    progress(file, size := part.stat().st_size)
    while size < file.size:
        if tries == _TRIES:
            raise PullError(
                f"{file.name} broke off at {size:,} bytes ({problem}). Run the command again to go on."
            )
        time.sleep(_PAUSE * (2**tries - 1))
        try:
            _append(url, file, part, http, progress)
            problem = "the hub sent too little"
        except (httpx.TransportError, _BusyError) as error:
            problem = str(error) or type(error).__name__
        before, size = size, part.stat().st_size
        tries = 0 if size > before else tries + 1


def _append(url: str, file: RemoteFile, part: Path, http: httpx.Client, progress: Progress) -> None:
    size = part.stat().st_size
    # identity: a compressed answer could not be resumed by bytes of the file
    headers = {"Range": f"bytes={size}-", "Accept-Encoding": "identity"}
    with http.stream("GET", url, headers=headers) as answer, part.open("r+b") as handle:
        if answer.status_code in _PASSING:
            raise _BusyError(refusal(answer.status_code, file.name))
        if answer.status_code in _RESTART:
            size = 0
            handle.truncate(0)
        elif answer.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise PullError(refusal(answer.status_code, file.name))
        handle.seek(size)
        if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return
        # no chunk size: what has arrived when the connection breaks must reach the file
        for chunk in answer.iter_bytes():
            handle.write(chunk)
            progress(file, size := size + len(chunk))
            if size > file.size:
                return


def _digest(path: Path, file: RemoteFile) -> str:
    """Hash ``path`` as the hub hashed ``file``: sha256, or git's sha1 over a header and the content."""
    digest = hashlib.sha256()
    if len(file.digest) != digest.digest_size * 2:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

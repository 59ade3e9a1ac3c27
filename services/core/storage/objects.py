"""Files too large for a database: in ``SF_DATA_DIR``, or in S3 or Google Cloud Storage."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from services.core.folders import private_folder
from services.core.settings import ConfigurationError, Settings
from services.core.storage.disk import Disk

if TYPE_CHECKING:  # obstore loads only where a bucket is named
    from obstore.store import GCSStore, RetryConfig, S3Store

FOLDER = "objects"
"""Within ``SF_DATA_DIR``."""

PIECE = 1 << 18
"""Bytes read or written at a time."""

_LOOK_BYTES = 16 << 20
"""Written between looks at what room is left."""

_PATIENCE: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
"""With a bucket that does not answer: callers wait for it, and who works for no caller tries again anyway."""


class ObjectStoreError(Exception):
    """The store refuses to read or write; trying again later may help. The text says why."""


class ObjectMissingError(ObjectStoreError):
    """There is no such object."""


class ObjectStore(Protocol):
    """Objects under keys like ``a/b/c``. Each becomes visible whole or not at all.

    Every method raises ``ObjectStoreError`` when the store cannot do it now, and ``ObjectMissingError``;
    ValueError for a key that ``is_key`` denies.
    """

    async def put(self, key: str, data: bytes) -> None:
        """Store an object; when this returns it outlives a crash."""
        ...

    async def put_stream(self, key: str, pieces: AsyncIterator[bytes]) -> int:
        """Store an object of unknown length in bounded memory; returns its length."""
        ...

    async def get(self, key: str, start: int, length: int) -> bytes:
        """Read a part of an object."""
        ...

    def stream(self, key: str, start: int = 0) -> AsyncGenerator[bytes]:
        """Read an object from a byte on, in pieces."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are missing already do no harm."""
        ...

    async def delete_all(self, prefix: str) -> None:
        """Delete every object below ``prefix``, a key's part up to a slash."""
        ...

    async def signed_url(self, key: str, seconds: float) -> str | None:
        """Give a URL that reads the object without credentials for a while, None where there are none."""
        ...


def is_key(text: str) -> bool:
    """Whether a text can be a key: parts with slashes between, none of which is empty, ``.`` or ``..``."""
    return "\0" not in text and not {"", ".", ".."} & set(text.split("/"))


def open_store(settings: Settings) -> ObjectStore:
    """Open the store that ``SF_OBJECT_STORE`` names; raises ``ConfigurationError`` for one that cannot be."""
    if settings.object_store is None:
        return FileStore(settings.data_dir / FOLDER, Disk.of(settings))
    return RemoteStore(bucket(settings.object_store, "SF_OBJECT_STORE"))


class FileStore:
    """Objects as files: written beside their place, flushed to the disk, then moved there.

    None is begun while the disk is full to its reserve.
    """

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self._folder = folder
        self._disk = disk

    async def put(self, key: str, data: bytes) -> None:
        """See ``ObjectStore``."""
        await _blocking(self._require_room)
        await _blocking(self._put, key, data)

    async def put_stream(self, key: str, pieces: AsyncIterator[bytes]) -> int:
        """See ``ObjectStore``."""
        length = checked = 0
        target = self._path(key)
        beside = _beside(target)
        await _blocking(self._require_room)
        file = await _blocking(_create, beside)
        try:
            with contextlib.closing(file):
                async for piece in pieces:
                    length += len(piece)
                    if length - checked >= _LOOK_BYTES:
                        await _blocking(self._require_room)
                        checked = length
                    await _blocking(_write, file, piece)
                await _blocking(_settle, file, beside, target)
        except BaseException:
            _discard(beside)
            raise
        return length

    async def get(self, key: str, start: int, length: int) -> bytes:
        """See ``ObjectStore``."""
        return await _blocking(_read, self._path(key), start, length)

    async def stream(self, key: str, start: int = 0) -> AsyncGenerator[bytes]:
        """See ``ObjectStore``."""
        while piece := await self.get(key, start, PIECE):
            yield piece
            start += len(piece)

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ObjectStore``."""
        for key in keys:
            await _blocking(self._path(key).unlink, True)

    async def delete_all(self, prefix: str) -> None:
        """See ``ObjectStore``."""
        await _blocking(_remove, self._path(prefix))

    async def signed_url(self, key: str, seconds: float) -> str | None:
        """See ``ObjectStore``; there are none."""
        del key, seconds
        return None

    def _path(self, key: str) -> Path:
        return self._folder / _checked(key)

    def _require_room(self) -> None:
        if self._disk is not None and self._disk.full:
            raise OSError(errno.ENOSPC, "The disk is full but for a reserve")

    def _put(self, key: str, data: bytes) -> None:
        target = self._path(key)
        beside = _beside(target)
        try:
            with _create(beside) as file:
                _write(file, data)
                _settle(file, beside, target)
        except BaseException:
            _discard(beside)
            raise


class RemoteStore:
    """Objects in a bucket. Credentials come from the environment, as the cloud's own tools take them."""

    def __init__(self, store: S3Store | GCSStore) -> None:
        self._store = store

    async def put(self, key: str, data: bytes) -> None:
        """See ``ObjectStore``."""
        with _translated():
            await self._store.put_async(_checked(key), data)

    async def put_stream(self, key: str, pieces: AsyncIterator[bytes]) -> int:
        """See ``ObjectStore``."""
        length = 0

        async def counted() -> AsyncGenerator[bytes]:
            nonlocal length
            async for piece in pieces:
                length += len(piece)
                yield piece

        with _translated():
            async with contextlib.aclosing(counted()) as stream:
                await self._store.put_async(_checked(key), stream)
        return length

    async def get(self, key: str, start: int, length: int) -> bytes:
        """See ``ObjectStore``."""
        with _translated():
            return bytes(await self._store.get_range_async(_checked(key), start=start, length=length))

    async def stream(self, key: str, start: int = 0) -> AsyncGenerator[bytes]:
        """See ``ObjectStore``."""
        with _translated():
            options: Any = {"range": {"offset": start}} if start else None
            found = await self._store.get_async(_checked(key), options=options)
            async for piece in found.stream(PIECE):
                yield bytes(piece)

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ObjectStore``."""
        with _translated(), contextlib.suppress(FileNotFoundError):
            await self._store.delete_async(list(map(_checked, keys)))

    async def delete_all(self, prefix: str) -> None:
        """See ``ObjectStore``."""
        with _translated():
            async for found in self._store.list(_checked(prefix)):
                await self._store.delete_async([each["path"] for each in found])

    async def signed_url(self, key: str, seconds: float) -> str | None:
        """See ``ObjectStore``."""
        import obstore

        with _translated():
            return await obstore.sign_async(self._store, "GET", _checked(key), timedelta(seconds=seconds))


def bucket(url: str, name: str) -> S3Store | GCSStore:
    """Open ``s3://bucket/prefix`` or ``gs://bucket/prefix``; ``name`` is what an error calls the URL."""
    from obstore.exceptions import BaseError
    from obstore.store import GCSStore, S3Store

    kinds: dict[str, type[S3Store | GCSStore]] = {"s3": S3Store, "gs": GCSStore}
    scheme, _, rest = url.strip().partition("://")
    scheme = scheme.lower()
    place, _, prefix = rest.partition("/")
    if scheme not in kinds or not place:
        raise ConfigurationError(f"{name} must be s3://bucket/prefix or gs://bucket/prefix.")
    try:
        return kinds[scheme](place, prefix=prefix.strip("/") or None, retry_config=_PATIENCE)
    except (BaseError, ValueError) as error:
        raise ConfigurationError(f"{name} cannot be used: {error}.") from error


@contextlib.contextmanager
def _translated() -> Any:
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissingError(str(error)) from error
    except (BaseError, OSError) as error:
        raise ObjectStoreError(str(error)) from error


async def _blocking(work: Any, *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(work, *arguments)
    except FileNotFoundError as error:
        raise ObjectMissingError(str(error)) from error
    except OSError as error:
        raise ObjectStoreError(str(error)) from error


def _checked(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"no key of an object: {key!r}")
    return key


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # what it was for has failed already, and that is told
        path.unlink()


def _create(path: Path) -> FileIO:
    """Open a file that holds nothing back: closing it after a failure does not fail again."""
    private_folder(path.parent)
    return open(path, "xb", buffering=0, opener=_owner_only)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _settle(file: FileIO, beside: Path, target: Path) -> None:
    """Bring the file to its place so that after a power cut it is there whole or not at all."""
    os.fsync(file.fileno())
    beside.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)

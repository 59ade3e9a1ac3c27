"""Files that callers upload for jobs, and the files of those jobs beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from sqlalchemy import and_, or_, select

from services.batch.files import Files
from services.batch.quotas import Holdings, check
from services.batch.schema import File, file_key, new_file_id, part_key
from services.batch.service import Caller, store_away
from services.batch.table import FILES, BatchJob, JobTable, UploadedFile
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import Database
from services.core.storage.disk import Disk
from services.core.storage.objects import ObjectMissingError, ObjectStore, ObjectStoreError

PURPOSE = "batch"

_PIECE = 1 << 20
_AT_ONCE = 100
_LONGEST_ID = 100


class Uploads:
    """Files of callers; every method raises ``ServiceError``: RESOURCE_NOT_FOUND, SERVICE_UNAVAILABLE."""

    def __init__(
        self, settings: Settings, database: Database, table: JobTable, store: ObjectStore, files: Files
    ) -> None:
        self._database = database
        self._table = table
        self._store = store
        self._files = files
        self._tiers = settings.tiers
        self._longest = settings.batch_expire_seconds
        self._disk = Disk.of(settings)

    async def save(
        self, caller: Caller, filename: str, content: memoryview, seconds: float | None
    ) -> UploadedFile:
        """Keep a file for ``seconds``, at most as long as jobs are kept.

        Raises also AUTHZ_RESOURCE_LIMIT_EXCEEDED and STORAGE_FULL.
        """
        await asyncio.to_thread(self._disk.require_room, "files")
        tier, more = self._tiers[caller.tier], Holdings(stored_bytes=len(content))
        check(tier, await self._table.usage(caller.key_id), more)
        now = time.time()
        ends = now + min(seconds or self._longest, self._longest)
        file = UploadedFile(new_file_id(), caller.key_id, PURPOSE, filename, len(content), now, ends)
        try:
            await self._store.put_stream(file_key(file.id), _pieces(content))
        except ObjectStoreError as error:
            raise store_away() from error
        try:
            await self._table.add_file(file, lambda used: check(tier, used, more))
        except ServiceError:
            await self._store.delete([file_key(file.id)])
            raise
        return file

    async def list(
        self, key_id: str, *, purpose: str, after: str | None, limit: int, newest_first: bool
    ) -> list[UploadedFile]:
        """Give an owner's files, behind the file ``after``."""
        made, name = FILES.c.created_at, FILES.c.id
        query = select(*FILES.c).where(FILES.c.owner == key_id, FILES.c.expires_at > time.time())
        if purpose:
            query = query.where(FILES.c.purpose == purpose)
        if after is not None:
            last = select(made).where(name == after).scalar_subquery()
            behind = made < last if newest_first else made > last
            query = query.where(or_(behind, and_(made == last, name > after)))
        query = query.order_by(made.desc() if newest_first else made, name).limit(limit)
        async with self._database.read() as connection:
            return [UploadedFile(**row) for row in (await connection.execute(query)).mappings()]

    async def find(self, key_id: str, file_id: str) -> UploadedFile:
        """Look a file up."""
        query = select(*FILES.c).where(FILES.c.id == file_id, FILES.c.owner == key_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None or row["expires_at"] <= time.time():
            raise _not_found(file_id)
        return UploadedFile(**row)

    async def delete(self, key_id: str, file_id: str) -> None:
        """Delete a file; raises CONFLICT_STATE for one that a job is being made from."""
        file = await self.find(key_id, file_id)
        job_id = await self._table.uses(file_id)
        if job_id is not None:
            raise ServiceError(
                ErrorCode.CONFLICT_STATE, reason=f"File '{file_id}' is the input of batch '{job_id}'."
            )
        try:
            # The content first, which needs no room on a full disk.
            await self._store.delete(await self._keys(file))
        except ObjectStoreError as error:
            raise store_away() from error
        await self._table.drop_file(file)

    async def pieces(self, file: UploadedFile) -> AsyncGenerator[bytes]:
        """Read a file."""
        try:
            if file.job_id is None:
                stream = self._store.stream(file_key(file.id))
            else:
                job = await self._job(file)
                stream = (await self._files.open(job, _kind(file))).pieces()
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    yield piece
        except ObjectMissingError as error:
            raise _not_found(file.id) from error
        except ObjectStoreError as error:
            raise store_away() from error

    async def expire(self) -> None:
        """Delete uploaded files whose time is over and that no job needs."""
        query = select(*FILES.c).where(FILES.c.expires_at <= time.time(), FILES.c.job_id.is_(None))
        async with self._database.read() as connection:
            rows = (await connection.execute(query.limit(_AT_ONCE))).mappings()
            late = [UploadedFile(**row) for row in rows]
        for file in late:
            if await self._table.uses(file.id) is None:
                await self._store.delete([file_key(file.id)])
                await self._table.drop_file(file)

    async def _keys(self, file: UploadedFile) -> list[str]:
        if file.job_id is None:
            return [file_key(file.id)]
        return [
            part_key(file.job_id, part.name, _kind(file)) for part in await self._table.parts(file.job_id)
        ]

    async def _job(self, file: UploadedFile) -> BatchJob:
        assert file.job_id is not None
        job = await self._table.find(file.job_id)
        if job is None:
            raise _not_found(file.id)
        return job


def _kind(file: UploadedFile) -> File:
    return File(file.id.rpartition("-")[2])


def _not_found(file_id: str) -> ServiceError:
    return ServiceError(ErrorCode.RESOURCE_NOT_FOUND, resource_type="File", resource_id=file_id[:_LONGEST_ID])


async def _pieces(content: memoryview) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _PIECE):
        yield bytes(content[start : start + _PIECE])

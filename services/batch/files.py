"""The files of a job, out of the parts that its chunks became."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress

import orjson

from services.batch.schema import File, JobStatus, State, folder, input_key, joined_key, part_key
from services.batch.table import BatchJob, ChunkFiles, JobTable
from services.core.storage.objects import ObjectMissingError, ObjectStore, ObjectStoreError

_LONGEST_REASON = 500


class StoredFile:
    """A file of a job: its parts one behind the other."""

    def __init__(self, store: ObjectStore, lengths: Mapping[str, int]) -> None:
        self._store = store
        self._lengths = lengths
        self.length = sum(lengths.values())

    async def pieces(self, asked: range | None = None) -> AsyncGenerator[bytes]:
        """Read it, or the bytes ``asked`` of it, in bounded memory; raises ``ObjectStoreError``."""
        start, end = (0, self.length) if asked is None else (asked.start, asked.stop)
        begin = 0
        for key, length in self._lengths.items():
            if max(start, begin) < min(end, begin + length):
                async with aclosing(self._part(key, max(0, start - begin), min(length, end - begin))) as part:
                    async for piece in part:
                        yield piece
            begin += length

    async def _part(self, key: str, start: int, end: int) -> AsyncGenerator[bytes]:
        async with aclosing(self._store.stream(key, start)) as pieces:
            async for piece in pieces:
                yield piece[: end - start]
                start += len(piece)
                if start >= end:
                    return
        raise ObjectMissingError(f"{key} has {start} bytes and should have {end}")


class Files:
    """Output and error files of jobs."""

    def __init__(self, table: JobTable, store: ObjectStore) -> None:
        self._table = table
        self._store = store

    async def status(self, job: BatchJob) -> JobStatus:
        """Say what is told of a job now, with the URLs of its files."""
        now = time.time()
        state = State.EXPIRED if job.expires_at <= now else job.state
        return JobStatus(
            batch_id=job.id,
            state=state,
            model=job.model,
            created_at=job.created_at,
            completed_at=job.completed_at,
            expires_at=job.expires_at,
            total=job.total,
            completed=job.completed,
            failed=job.failed,
            total_tokens=job.total_tokens,
            error=job.error,
            output_url=await self._url(job, state, File.OUTPUT, now),
            error_file_url=await self._url(job, state, File.ERRORS, now),
        )

    @staticmethod
    def has(job: BatchJob, state: State, file: File) -> bool:
        """Whether a job in a state has a file; a failed job has what was done before, if anything."""
        if file is File.ERRORS:
            return state.ended and state is not State.EXPIRED and job.failed > 0
        return state in (State.COMPLETED, State.CANCELLED) or (state is State.FAILED and job.completed > 0)

    async def first_fault(self, job: BatchJob) -> str:
        """Say why a job has no good line: what is wrong with the first one."""
        begin = bytearray()
        async with aclosing((await self.open(job, File.ERRORS)).pieces()) as pieces:
            async for piece in pieces:
                begin += piece
                if b"\n" in piece:
                    break
        fault = orjson.loads(begin.partition(b"\n")[0])["error"]
        return f"No line could be embedded. Line {fault['line']}: {fault['message'][:_LONGEST_REASON]}"

    async def open(self, job: BatchJob, file: File) -> StoredFile:
        """Find a file of a job."""
        parts = await self._table.parts(job.id)
        lengths = {part_key(job.id, part.name, file): _length(part, file) for part in parts}
        return StoredFile(self._store, lengths)

    async def join(self, job: BatchJob) -> bool:
        """Make one object of each file, if the store gives URLs for objects; false if not."""
        if await self._store.signed_url(joined_key(job.id, File.OUTPUT), 1.0) is None:
            return False
        for file in (File.OUTPUT, File.ERRORS):
            async with aclosing((await self.open(job, file)).pieces()) as pieces:
                await self._store.put_stream(joined_key(job.id, file), pieces)
        return True

    async def delete_input(self, job: BatchJob) -> None:
        """Make room at once; what cannot be deleted now is when the job expires."""
        if job.input_file is not None:  # its owner's
            return
        with suppress(ObjectStoreError):
            await self._store.delete([input_key(job.id, job.input_name)])

    async def delete(self, job_id: str) -> None:
        """Delete everything of a job."""
        await self._store.delete_all(folder(job_id))

    async def _url(self, job: BatchJob, state: State, file: File, now: float) -> str | None:
        if not self.has(job, state, file):
            return None
        if job.joined:
            return await self._store.signed_url(joined_key(job.id, file), max(1.0, job.expires_at - now))
        return f"{job.base_url}/v1/batch/{job.id}/{file}"


def _length(part: ChunkFiles, file: File) -> int:
    return part.output_bytes if file is File.OUTPUT else part.error_bytes

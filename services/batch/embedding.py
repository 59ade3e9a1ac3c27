"""From the lines of a chunk to the lines of its files, whatever single lines do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from services.batch.lines import Fault, Line, error_line, output_line
from services.batch.table import BatchJob
from services.core.call import Call, Priority
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine, InferenceError, NotANumberError
from services.embed.logic import embed_vectors, part

logger = logging.getLogger(__name__)

GROUP = 16
"""Lines tried together in a chunk at which a worker has died."""

STRIKES = 5
"""Deaths of workers at one line alone after which the line is to blame.

More than a worker that is killed for other reasons, again and again, is likely to have at the same line: of
twenty kills three fell on one."""

_RETRY_SECONDS = (0.1, 5.0)
_FATAL = Fault("INTERNAL_ERROR", f"The line ended the process that embedded it {STRIKES} times.")
_OURS = Fault("INTERNAL_ERROR", "The model failed on this line.")

Note = Callable[[Mapping[str, int]], Awaitable[None]]
"""Stores how often workers died at ranges of lines, before the next one is tried."""


@dataclass(slots=True)
class Results:
    """What is written of the lines of a chunk, by their number."""

    output: dict[int, bytes] = field(default_factory=dict[int, bytes])
    errors: dict[int, bytes] = field(default_factory=dict[int, bytes])
    tokens: int = 0


class _Gate:
    """Lets many in together, or one alone."""

    def __init__(self) -> None:
        self._entry = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()
        self._inside = 0

    @asynccontextmanager
    async def together(self) -> AsyncGenerator[None]:
        async with self._entry:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        async with self._entry:
            await self._empty.wait()
            yield


class ChunkEmbedder:
    """Embeds lines behind all interactive calls, with the engine they share.

    A chunk at which a worker has died has the process to itself: the next death is its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gate = _Gate()

    async def embed(self, job: BatchJob, lines: Sequence[Line]) -> Results:
        """Embed all good lines at once; see ``_embed`` for what happens to bad ones."""
        results = self._refused(job, lines)
        async with self._gate.together():
            await self._embed(job, [line for line in lines if line.fault is None], results)
        return results

    async def embed_warily(
        self, job: BatchJob, lines: Sequence[Line], tries: Mapping[str, int], note: Note
    ) -> Results:
        """Embed few lines at a time, and one by one where a worker has died, each try noted beforehand.

        A line that was alone ``STRIKES`` times when a worker died is not tried again.
        """
        async with self._gate.alone():
            return await self._try(job, lines, tries, note)

    async def _try(
        self, job: BatchJob, lines: Sequence[Line], tries: Mapping[str, int], note: Note
    ) -> Results:
        results = self._refused(job, lines)
        good = [line for line in lines if line.fault is None]
        for first in range(0, len(good), GROUP):
            group = good[first : first + GROUP]
            name = f"{group[0].number}+"
            if name not in tries:
                await note({**tries, name: 1})
                await self._embed(job, group, results)
                continue
            for line in group:
                deaths = tries.get(str(line.number), 0)
                if deaths >= STRIKES:
                    logger.error("line %d of %s ends processes; it is left out", line.number, job.id)
                    results.errors[line.number] = error_line(job.id, line, _FATAL)
                    continue
                await note({**tries, str(line.number): deaths + 1})
                await self._embed(job, [line], results)
        return results

    def _refused(self, job: BatchJob, lines: Sequence[Line]) -> Results:
        results = Results()
        for line in lines:
            if line.fault is not None:
                results.errors[line.number] = error_line(job.id, line, line.fault)
        return results

    async def _embed(self, job: BatchJob, lines: Sequence[Line], results: Results) -> None:
        """Embed the lines that ask for the same together."""
        groups: dict[object, list[Line]] = {}
        for line in lines:
            groups.setdefault(_asked(line), []).append(line)
        for group in groups.values():
            await self._embed_alike(job, group, results)

    async def _embed_alike(self, job: BatchJob, lines: Sequence[Line], results: Results) -> None:
        """Embed lines together; if that cannot be, halves of them, down to the line that is to blame."""
        try:
            await self._run(job, lines, results)
            return
        except ServiceError as error:
            fault = Fault(error.code.value, error.detail)
        except (InferenceError, NotANumberError):
            if len(lines) == 1:
                logger.exception("line %d of %s cannot be embedded", lines[0].number, job.id)
            fault = _OURS
        if len(lines) == 1:
            results.errors[lines[0].number] = error_line(job.id, lines[0], fault)
            return
        middle = len(lines) // 2
        await self._embed_alike(job, lines[:middle], results)
        await self._embed_alike(job, lines[middle:], results)

    async def _run(self, job: BatchJob, lines: Sequence[Line], results: Results) -> None:
        model = self._engine.embedder(job.model)
        requests = [line.request for line in lines if line.request is not None]
        contents = [content for request in requests for content in request.contents]
        whole = replace(requests[0], model=job.model, contents=contents)
        delay = _RETRY_SECONDS[0]
        while True:
            call = Call(f"{job.id}:{lines[0].number}", key_id=job.owner, priority=Priority.BATCH)
            try:
                raw = await embed_vectors(whole, model, call)
                break
            except ServiceError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_SECONDS[1])
        begin, counts = 0, list(raw.counts)
        for line, request in zip(lines, requests, strict=True):
            count = len(request.contents)
            end = begin + sum(counts[:count])
            del counts[:count]
            result = part(raw, begin, end, request.encodings)
            results.output[line.number] = output_line(job.id, line, result)
            results.tokens += result.usage.total
            begin = end
            if line.number % GROUP == 0:
                await asyncio.sleep(0)


def _asked(line: Line) -> object:
    """Give what a line has in common with those it may be embedded with."""
    assert line.request is not None
    # Texts that are read as one have nobody else among them.
    alone = line.number if line.request.late_chunking else None
    return replace(line.request, contents=(), encodings=()), alone

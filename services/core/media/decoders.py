"""The decoding processes of a server: few, limited, replaced when they are lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from services.core.media.errors import MediaError
from services.core.media.metrics import DECODERS_RESTARTED

_HEADER_BYTES = 1 << 16
_WALL_TIMES_CPU = 20
"""A process that is not given its core is waited for as much longer."""


Head: TypeAlias = Mapping[str, Any]
Take: TypeAlias = Callable[[Head, Callable[[], Awaitable[bytearray]]], Awaitable[None]]
"""Takes a piece of an answer: what it is, and what reads its bytes, which has to be called."""

Room: TypeAlias = Callable[[int], Awaitable[None]]
"""Waits for room for so many bytes of pixels, in the place of what was waited for before."""


class Decoders:
    """At most ``count`` processes, each started when it is first wanted; of one event loop.

    Each has ``memory_bytes`` of address space.
    """

    def __init__(self, count: int, *, memory_bytes: int) -> None:
        self.count = count
        self._memory_bytes = memory_bytes
        self._turns = asyncio.Semaphore(count)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._closed = False
        self._lost = 0

    @property
    def pids(self) -> list[int]:
        """The processes that there are."""
        return [decoder.pid for decoder in (*self._idle, *self._busy)]

    @property
    def busy(self) -> int:
        """How many files are being decoded."""
        return len(self._busy)

    async def decode(
        self, data: bytes, rules: Mapping[str, Any], cpu_seconds: float, room: Room, take: Take
    ) -> None:
        """Give ``take`` the pieces of what ``data`` is, one by one; the file may take ``cpu_seconds``.

        ``rules`` are those of ``pictures`` or ``films``. Waits for a process to be free, in the order of the
        calls, and before pixels are decoded for ``room``, which is no time of the file's. Raises MediaError
        for a file that cannot be decoded, or not within the bounds. Cancelling ends the decoding, as does
        what ``take`` raises.
        """
        async with self._turns:
            decoder = await self._take()
            self._busy.add(decoder)
            try:
                async with asyncio.timeout(cpu_seconds * _WALL_TIMES_CPU) as patience:

                    async def wait(size: int) -> None:
                        patience.reschedule(None)
                        await room(size)
                        now = asyncio.get_running_loop().time()
                        patience.reschedule(now + cpu_seconds * _WALL_TIMES_CPU)

                    refused = await decoder.decode(data, {**rules, "cpu_seconds": cpu_seconds}, wait, take)
            except _Lost as lost:
                self._lost += 1
                raise MediaError(_told(lost.returncode, cpu_seconds)) from lost
            except TimeoutError as error:
                self._lost += 1
                await decoder.end()
                raise MediaError("it takes too long to decode") from error
            except BaseException:
                self._lost += 1
                await decoder.end()
                raise
            else:
                self._idle.append(decoder)
            finally:
                self._busy.discard(decoder)
        if refused is not None:
            raise MediaError(refused)

    async def aclose(self) -> None:
        """End the processes; what is being decoded fails."""
        self._closed = True
        decoders = [*self._idle, *self._busy]
        self._idle.clear()
        await asyncio.gather(*(decoder.end() for decoder in decoders))

    async def _take(self) -> _Child:
        if self._closed:
            raise RuntimeError("the decoders are closed")
        while self._idle:
            decoder = self._idle.pop()
            if decoder.alive:
                return decoder
            self._lost += 1
        started = await _Child.start(self._memory_bytes)
        if self._lost:
            self._lost -= 1
            DECODERS_RESTARTED.inc()
        return started


def _environment() -> dict[str, str]:
    """What a process knows of ours; numpy's own threads would take its address space on many cores."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _told(returncode: int, cpu_seconds: float) -> str:
    if returncode == -signal.SIGPROF:
        return f"it takes more than {cpu_seconds:g} seconds to decode"
    return "the decoder broke down on it"


class _Lost(Exception):  # noqa: N818
    """The process ended in the middle of a file."""

    def __init__(self, returncode: int) -> None:
        super().__init__(f"a decoding process ended with {returncode}")
        self.returncode = returncode


class _Child:
    def __init__(self, process: Process) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests = process.stdin
        self._answers = process.stdout

    @classmethod
    async def start(cls, memory_bytes: int) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "services.core.media.decoder",
            str(memory_bytes),
            stdin=PIPE,
            stdout=PIPE,
            env=_environment(),
            # Ctrl-C in a terminal is for the server, which ends its decoders itself.
            start_new_session=True,
        )
        decoder = cls(process)
        try:
            await decoder._read_bytes(_HEADER_BYTES)
            await decoder._read_bytes(None)
        except asyncio.IncompleteReadError as error:
            await process.wait()
            raise RuntimeError("a decoding process ended at its start") from error
        except BaseException:
            await decoder.end()
            raise
        return decoder

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        if self._process.returncode is not None:
            return False
        try:
            # The loop learns of an end a little later than the kernel.
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    async def decode(self, data: bytes, rules: Mapping[str, Any], room: Room, take: Take) -> str | None:
        """Give ``take`` all pieces, behind ``room``; returns why not, if the file is refused.

        Raises _Lost when the process ends instead.
        """
        try:
            head = json.dumps(rules).encode()
            self._requests.write(len(head).to_bytes(4, "little") + head + len(data).to_bytes(4, "little"))
            self._requests.write(data)
            await self._requests.drain()
            while True:
                answer = json.loads(await self._read_bytes(_HEADER_BYTES))
                if "done" in answer or "refused" in answer:
                    await self._read_bytes(None)
                    return answer.get("refused")
                if "needs" in answer:
                    await self._read_bytes(None)
                    await room(answer["needs"])
                    self._requests.write(b"\1")
                    continue
                await take(answer, lambda: self._read_bytes(None))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _Lost(await self._process.wait()) from error

    async def end(self) -> None:
        """Kill the process, wherever it is."""
        with suppress(ProcessLookupError):
            self._process.kill()
        # Until it is waited for it stays in the table of processes, so a cancelled call does that too.
        await asyncio.shield(self._process.wait())

    async def _read_bytes(self, most: int | None) -> bytearray:
        length = int.from_bytes(await self._answers.readexactly(4), "little")
        assert most is None or length <= most
        # Writable, as torch wants what it takes over, and as it comes: the stream would hold all of it too.
        data = bytearray(length)
        at = 0
        while at < length:
            piece = await self._answers.read(length - at)
            if not piece:
                raise asyncio.IncompleteReadError(b"", length - at)
            data[at : at + len(piece)] = piece
            at += len(piece)
        return data

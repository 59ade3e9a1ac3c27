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

import numpy as np

from services.core.content import Image
from services.core.media.errors import MediaError

_HEADER_BYTES = 1 << 16
_WALL_TIMES_CPU = 20
"""A process that is not given its core is waited for as much longer."""


class Decoders:
    """At most ``count`` processes, each started when it is first wanted; of one event loop.

    Each has ``memory_bytes`` of address space and ``cpu_seconds`` for one file.
    """

    def __init__(self, count: int, *, memory_bytes: int, cpu_seconds: float) -> None:
        self.count = count
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._turns = asyncio.Semaphore(count)
        self._idle: list[_Decoder] = []
        self._busy: set[_Decoder] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """The processes that there are."""
        return [decoder.pid for decoder in (*self._idle, *self._busy)]

    @property
    def busy(self) -> int:
        """How many files are being decoded."""
        return len(self._busy)

    async def decode(
        self, data: bytes, rules: Mapping[str, Any], finish: Finish | None = None
    ) -> list[Image]:
        """Give the picture that ``data`` is, or the pages of a PDF; ``rules`` are ``pictures.Rules``.

        ``finish`` is applied to each as it comes, so that of those before it no more than one is held. Waits
        for a process to be free, in the order of the calls. Raises MediaError for a file that cannot be
        decoded, or not within the bounds. Cancelling ends the decoding.
        """
        async with self._turns:
            decoder = await self._take()
            self._busy.add(decoder)
            try:
                async with asyncio.timeout(self._cpu_seconds * _WALL_TIMES_CPU):
                    answer = await decoder.decode(data, rules, finish)
            except _Lost as lost:
                raise MediaError(self._told(lost.returncode)) from lost
            except TimeoutError as error:
                await decoder.end()
                raise MediaError("it takes too long to decode") from error
            except BaseException:
                await decoder.end()
                raise
            else:
                self._idle.append(decoder)
            finally:
                self._busy.discard(decoder)
        if isinstance(answer, str):
            raise MediaError(answer)
        return answer

    async def aclose(self) -> None:
        """End the processes; what is being decoded fails."""
        self._closed = True
        decoders = [*self._idle, *self._busy]
        self._idle.clear()
        await asyncio.gather(*(decoder.end() for decoder in decoders))

    async def _take(self) -> _Decoder:
        if self._closed:
            raise RuntimeError("the decoders are closed")
        while self._idle:
            decoder = self._idle.pop()
            if decoder.alive:
                return decoder
        return await _Decoder.start(self._memory_bytes, self._cpu_seconds)

    def _told(self, returncode: int) -> str:
        if returncode == -signal.SIGPROF:
            return f"it takes more than {self._cpu_seconds:g} seconds to decode"
        return "the decoder broke down on it"


Finish: TypeAlias = Callable[[Image], Awaitable[Image]]
"""What is done to a picture while its process waits."""


class _Lost(Exception):  # noqa: N818
    """The process ended in the middle of a file."""

    def __init__(self, returncode: int) -> None:
        super().__init__(f"a decoding process ended with {returncode}")
        self.returncode = returncode


class _Decoder:
    def __init__(self, process: Process) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests = process.stdin
        self._answers = process.stdout

    @classmethod
    async def start(cls, memory_bytes: int, cpu_seconds: float) -> _Decoder:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "services.core.media.decoder",
            str(memory_bytes),
            str(cpu_seconds),
            stdin=PIPE,
            stdout=PIPE,
            env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
            # Ctrl-C in a terminal is for the server, which ends its decoders itself.
            start_new_session=True,
        )
        decoder = cls(process)
        try:
            await decoder._read()
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

    async def decode(self, data: bytes, rules: Mapping[str, Any], finish: Finish | None) -> list[Image] | str:
        """Return the pictures, or why there are none. Raises _Lost when the process ends instead."""
        try:
            head = json.dumps(rules).encode()
            self._requests.write(len(head).to_bytes(4, "little") + head + len(data).to_bytes(4, "little"))
            self._requests.write(data)
            await self._requests.drain()
            images: list[Image] = []
            while True:
                answer, pixels = await self._read()
                if "done" in answer:
                    return images
                if "refused" in answer:
                    return str(answer["refused"])
                width, height = answer["size"]
                # Writable, as torch wants what it takes over.
                array = np.frombuffer(bytearray(pixels), np.uint8).reshape(height, width, 3)
                image = Image(array, tuple(answer["source"]))
                images.append(image if finish is None else await finish(image))
                del pixels, array, image
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _Lost(await self._process.wait()) from error

    async def end(self) -> None:
        """Kill the process, wherever it is."""
        with suppress(ProcessLookupError):
            self._process.kill()
        # Until it is waited for it stays in the table of processes, so a cancelled call does that too.
        await asyncio.shield(self._process.wait())

    async def _read(self) -> tuple[dict[str, Any], bytes]:
        head = json.loads(await self._read_bytes(_HEADER_BYTES))
        return head, await self._read_bytes(None)

    async def _read_bytes(self, most: int | None) -> bytes:
        length = int.from_bytes(await self._answers.readexactly(4), "little")
        assert most is None or length <= most
        return await self._answers.readexactly(length)

"""The bodies of all calls of a process: how many bytes of them there are, and whose turn it is to be read."""

from __future__ import annotations

import asyncio
import ctypes
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.descriptor import Descriptor

from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.requests.json_parts import (
    MalformedError,
    Outline,
    StringTooLongError,
    TooManyValuesError,
    build,
    outline,
    place_of,
)
from services.core.requests.limits import MAX_STRING_BYTES, RequestLimits
from services.core.requests.parsing import BODY
from services.core.serving.wire import TooManyFieldsError, measure

SMALL_BYTES = 1 << 16
"""Up to here a body is parsed at once, which takes a few milliseconds at most."""

_LARGE_BYTES = 1 << 20
_VALUES_PER_FIELD = 4
"""A field of a typed message costs the event loop as much as so many values, since it is parsed in one go."""

VALUE_BYTES = 160
"""What a value, and as much again its name, takes in memory beyond its characters: the object, its place in a
list or dictionary, where it stands in the body, what the request is made of it."""

_TRIM_SECONDS = 1.0
_RETRY_SECONDS = 1.0


Hold = Callable[[int], None]
"""Counts bytes of a call in, until it has ended; raises ServiceError as ``Bodies.enter`` does."""


class Bodies:
    """Reads large bodies one at a time, fair between tenants, and refuses them when there are too many."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._held = 0
        self._turns = _Turns()
        self._trimmer = _Trimmer()

    def enter(self, size: int, held: int = 0) -> None:
        """Count the bytes of a body in, of whose call there are ``held`` already.

        Raises ServiceError: SERVICE_UNAVAILABLE when there are too many, VALIDATION_ERROR when those of this
        call alone are.
        """
        most = self._limits.together
        if held and held + size > most:
            message = f"takes more than {most:,} bytes in memory, for its many values or wide characters"
            raise validation_error([FieldError(BODY, message, "too_large")])
        if self._held + size > most:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SECONDS)
        self._held += size

    def leave(self, size: int) -> None:
        """Count the bytes of a body out: nothing of it is needed any more."""
        self._held -= size
        if size >= _LARGE_BYTES:
            self._trimmer.trim_soon()

    async def object_of(self, data: memoryview, key_id: str, hold: Hold) -> dict[str, Any]:
        """Build a large JSON object, part by part; raises ServiceError as ``Hold`` does and VALIDATION_ERROR.

        ``hold`` counts what its values take in memory beyond what came.
        """
        async with self._turns.of(key_id):
            parts = await self.outline_of(data)
            hold(VALUE_BYTES * (parts.values + parts.names))
            steps = build(parts, MAX_STRING_BYTES, hold)
            while True:
                try:
                    next(steps)
                except StopIteration as done:
                    return done.value
                except MalformedError as error:
                    raise _malformed(data, error) from None
                except StringTooLongError:
                    raise _string_too_long() from None
                await asyncio.sleep(0)

    async def outline_of(self, data: memoryview) -> Outline:
        """Find the values of a JSON object; raises ServiceError VALIDATION_ERROR."""
        most = self._limits.values
        try:
            return await asyncio.to_thread(outline, data, most, MAX_STRING_BYTES)
        except MalformedError as error:
            raise _malformed(data, error) from None
        except TooManyValuesError:
            raise _too_many(most) from None
        except StringTooLongError:
            raise _string_too_long() from None

    @asynccontextmanager
    async def message(self, raw: bytes, kind: Descriptor, key_id: str, hold: Hold) -> AsyncGenerator[None]:
        """Hold the turn in which a large message is parsed; raises ServiceError as ``object_of`` does."""
        async with self._turns.of(key_id):
            most = max(1, self._limits.values // _VALUES_PER_FIELD)
            try:
                measured = await asyncio.to_thread(measure, raw, kind, most)
            except TooManyFieldsError:
                raise _too_many(most) from None
            if measured.longest > MAX_STRING_BYTES:
                raise _string_too_long()
            hold(measured.more + VALUE_BYTES * measured.fields)
            yield


def _string_too_long() -> ServiceError:
    message = f"holds a string of more than {MAX_STRING_BYTES:,} bytes, each character as wide as the widest"
    return validation_error([FieldError(BODY, message, "string_too_long")])


def _too_many(most: int) -> ServiceError:
    message = f"holds more than {most:,} values"
    return validation_error([FieldError(BODY, message, "too_many_values")])


def _malformed(data: memoryview, error: MalformedError) -> ServiceError:
    if error.at is None:
        return validation_error([FieldError(BODY, error.reason, "dict_type")])
    line, column = place_of(data, error.at)
    return not_json(error.reason, line, column)


def not_json(reason: str, line: int, column: int) -> ServiceError:
    """Build the 422 of a body that is not JSON."""
    message = f"is not valid JSON: {reason} (line {line}, column {column})"
    return validation_error([FieldError(BODY, message, "json_invalid")])


class _Turns:
    """One turn at a time; among those who wait, tenants take them by turns."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, key_id: str) -> AsyncGenerator[None]:
        if self._busy:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(key_id, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            key_id, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[key_id] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False


class _Trimmer:
    """Gives memory that large bodies have left in the allocator back to the system, where glibc has it."""

    def __init__(self) -> None:
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._timer: asyncio.TimerHandle | None = None

    def trim_soon(self) -> None:
        if self._trim is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TRIM_SECONDS, self._start)

    def _start(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)

"""Nothing of a call that has failed stays in memory until a collection of cycles comes by."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc.aio
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from services.core.call import Call
from services.core.errors import FieldError, ServiceError, validation_error
from tests.serving.probe import Running, failure, running

End = Callable[["Held"], Awaitable[None]]


class Held(list[int]):
    """What a call holds."""


async def refuse(held: Held) -> NoReturn:
    try:
        raise ValueError(held)
    except ValueError:
        raise validation_error([FieldError("x", "is wrong", "wrong", held)]) from None


async def break_down(held: Held) -> NoReturn:
    try:
        raise KeyError(held)
    except KeyError as error:
        raise RuntimeError(held) from error


async def break_down_in_a_group(held: Held) -> None:
    async def part() -> NoReturn:
        raise refused(held)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(part())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


def refused(held: Held) -> ServiceError:
    return validation_error([FieldError("x", "is wrong", "wrong", held)])


async def wait(held: Held) -> None:
    held.append(1)
    await asyncio.Event().wait()


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    logging.disable()  # pytest keeps records, and with them the stacks
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


async def _unary(house: Running) -> None:
    await failure(house.unary())


async def _rest(house: Running) -> None:
    await failure(house.rest(b'{"x":[1]}'))


async def _late(house: Running) -> None:
    await failure(house.unary(timeout=0.3))


async def _gone(house: Running) -> None:
    call = house.unary()
    while not house.probe.calls:  # noqa: ASYNC110 - the call itself has no event to tell it by
        await asyncio.sleep(0.01)
    call.cancel()


async def _stream(house: Running) -> None:
    call = house.streaming("Both")()
    await call.write(StringValue(value="x"))
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


@pytest.mark.parametrize("end", [refuse, break_down, break_down_in_a_group])
@pytest.mark.parametrize("send", [_unary, _rest, _stream])
@pytest.mark.usefixtures("no_collection")
async def test_a_failed_call_lets_go_of_what_it_held(
    end: End, send: Callable[[Running], Awaitable[None]]
) -> None:
    await _lets_go(end, send)


@pytest.mark.parametrize("send", [_late, _gone])
@pytest.mark.usefixtures("no_collection")
async def test_a_call_that_is_ended_lets_go_of_what_it_held(
    send: Callable[[Running], Awaitable[None]],
) -> None:
    await _lets_go(wait, send)


async def _lets_go(end: End, send: Callable[[Running], Awaitable[None]]) -> None:
    things: list[weakref.ref[Held]] = []

    async def act(call: Call, request: Any) -> Any:
        held = Held([1, 2, 3])
        things.append(weakref.ref(held))
        await end(held)
        return request

    async with running(act) as house:
        await send(house)
        async with asyncio.timeout(20):
            while any(thing() is not None for thing in things):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(things) == 1


def test_an_error_keeps_a_preview_and_not_the_value() -> None:
    error = FieldError("body -> " + "x" * 10_000, "y" * 10_000, "z" * 1000, ["v" * 10_000] * 10_000)
    assert len(error.field) <= 256
    assert len(error.message) <= 512
    assert len(str(error.input)) < 1000

"""What answering is, for every door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from services.chat.types import ChatRequest
from services.core.call import Call
from services.core.inference import Engine
from services.core.inference.answering import Answer

T = TypeVar("T")


class Chat:
    """Answers with the models of one engine.

    ``default`` bounds answers in tokens where a request does not; an answer takes ``seconds`` at most.
    """

    def __init__(self, engine: Engine, *, default: int, seconds: float) -> None:
        self._engine = engine
        self._default = default
        self._seconds = seconds

    @asynccontextmanager
    async def answer(self, request: ChatRequest, call: Call) -> AsyncGenerator[Answer]:
        """Begin an answer on behalf of ``call``, whose model and tokens are filled in; leaving ends it.

        Raises ``ServiceError``: messages or media that the model cannot take, a conversation that is too
        long, the key's limits, a full cache, an expired call.
        """
        call.model = request.model
        if call.deadline is None:
            call.deadline = call.started + self._seconds
        model = self._engine.chat(request.model)
        async with model.answer(request.turns, request.options, call, default=self._default) as answer:
            yield answer


async def or_heartbeats(values: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None]:
    """Yield what comes, and None each time that nothing has come for ``seconds``."""
    pending = asyncio.ensure_future(anext(values))
    try:
        while True:
            done, _ = await asyncio.wait((pending,), timeout=seconds)
            if not done:
                yield None
                continue
            try:
                value = pending.result()
            except StopAsyncIteration:
                return
            pending = asyncio.ensure_future(anext(values))
            yield value
    finally:
        pending.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
            await pending

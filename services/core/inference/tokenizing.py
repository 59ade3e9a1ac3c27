"""The first stage: texts to token ids, in Rust, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

from services.core.errors import ErrorCode, ServiceError

INLINE_CHARACTERS = 2048
"""Up to here tokenising (about 0.2 us a character) costs less than handing it to a thread and back."""

_CHUNK_CHARACTERS = 1 << 16
"""Texts of one Rust call. Its result takes some 100 bytes a token, so 2,048 long texts at once would take
hundreds of megabytes; and one call's chunks take turns with those of other calls."""

_GIANT_CHARACTERS = 1 << 20
"""A chunk (then a single text) from here on waits for its like: read whole, it takes seconds, and 60 times
its size in memory."""


_COMPANY = 8
"""Small calls that come together, from which on they go to a thread: it costs what tokenising one does."""

R = TypeVar("R")


class _Waiting(NamedTuple):
    """A small call that others may join."""

    texts: Sequence[str]
    work: Callable[[Sequence[str]], list[Any]]
    key: Hashable
    done: asyncio.Future[list[Any]]

    def settle(self, outcome: list[Any] | Exception) -> None:
        """Wake the call up, unless it has gone."""
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class TextThreads:
    """Work on the texts of a call in ``executor``, where up to ``width`` chunks run side by side.

    With ``joins`` small calls that come together go there too, those of a key in common: where the threads
    have cores of their own, the event loop has none for hundreds of them.
    """

    def __init__(self, executor: Executor, width: int, *, joins: bool = False) -> None:
        self._executor = executor
        self._width = width
        self._joins = joins
        self._waiting: list[_Waiting] = []
        self._giants = ThreadPoolExecutor(1, "giant-texts")

    def close(self) -> None:
        """Forget what waits. The executor given stays with its owner."""
        self._giants.shutdown(wait=False, cancel_futures=True)

    async def map(
        self,
        texts: Sequence[str],
        work: Callable[[Sequence[str]], list[R]],
        extra: int = 0,
        key: Hashable = None,
    ) -> list[R]:
        """Apply ``work``, one result per text, to chunks of ``texts``; few are worked on at once and here.

        ``extra`` are characters that ``work`` adds to each text. The ``work`` of calls with an equal ``key``
        is the same, so that one may do the texts of all. Raises ServiceError INPUT_INVALID for a text that is
        not Unicode (a lone surrogate).
        """
        if extra * len(texts) + sum(map(len, texts)) <= INLINE_CHARACTERS:
            if self._joins and key is not None:
                return await self._joined(texts, work, key)
            return _checked(texts, work)
        chunks = list(runs_of(texts))
        if len(chunks) == 1:
            return await self._in_thread(texts, work)
        results: list[list[R]] = [[] for _ in chunks]
        pending = iter(range(len(chunks)))

        async def take_turns() -> None:
            for i in pending:
                results[i] = await self._in_thread(chunks[i], work)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._width, len(chunks))):
                    group.create_task(take_turns())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [result for chunk in results for result in chunk]

    async def run(self, work: Callable[[], R]) -> R:
        """Run other work of a call where it holds up neither the event loop nor the models."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _joined(
        self, texts: Sequence[str], work: Callable[[Sequence[str]], list[R]], key: Hashable
    ) -> list[R]:
        """Wait for the calls that are about to come as well, then for the work on all of them."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(texts, work, key, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._begin, loop)
        self._waiting.append(waiting)
        return await waiting.done

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) < _COMPANY:
            for each in waiting:
                each.settle(_outcome(each))
            return
        by_key: dict[Hashable, list[_Waiting]] = {}
        for each in waiting:
            by_key.setdefault(each.key, []).append(each)
        for group in by_key.values():
            size = max(_COMPANY, -(-len(group) // self._width))
            for start in range(0, len(group), size):
                part = group[start : start + size]
                try:
                    future = loop.run_in_executor(self._executor, _outcomes, part)
                except RuntimeError as error:  # the executor has ended
                    for each in part:
                        each.settle(error)
                else:
                    future.add_done_callback(partial(_hand_out, part))

    async def _in_thread(self, texts: Sequence[str], work: Callable[[Sequence[str]], list[R]]) -> list[R]:
        executor = self._giants if sum(map(len, texts)) >= _GIANT_CHARACTERS else self._executor
        return await asyncio.get_running_loop().run_in_executor(executor, _checked, texts, work)


def _checked(texts: Sequence[str], work: Callable[[Sequence[str]], list[R]]) -> list[R]:
    try:
        return work(texts)
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            if not _is_unicode(text):
                raise ServiceError(
                    ErrorCode.INPUT_INVALID, reason="The input text is not valid Unicode."
                ) from None
        raise


def _outcome(each: _Waiting) -> list[Any] | Exception:
    try:
        return _checked(each.texts, each.work)
    except Exception as error:  # noqa: BLE001  (it is raised where the call waits)
        return error


def _outcomes(part: Sequence[_Waiting]) -> list[list[Any] | Exception]:
    """Work on the texts of all of ``part``, which have one key, together; where that fails on each alone."""
    try:
        results = part[0].work([text for each in part for text in each.texts])
    except Exception:  # noqa: BLE001  (whoever caused it fails again)
        return [_outcome(each) for each in part]
    bounds = pairwise(accumulate((len(each.texts) for each in part), initial=0))
    return [results[start:end] for start, end in bounds]


def _hand_out(part: Sequence[_Waiting], future: asyncio.Future[list[list[Any] | Exception]]) -> None:
    if future.cancelled():
        for each in part:
            each.done.cancel()
        return
    for each, outcome in zip(part, future.result(), strict=True):
        each.settle(outcome)


def runs_of(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut ``texts`` into neighbouring runs of about the chunk size, at least one text each."""
    start = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > _CHUNK_CHARACTERS:
            yield texts[start:i]
            start, size = i, 0
        size += len(text)
    yield texts[start:]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

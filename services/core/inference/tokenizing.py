"""The first stage: texts to token ids, in Rust, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from services.core.errors import ErrorCode, ServiceError

INLINE_CHARACTERS = 2048
"""Up to here tokenising (about 0.2 us a character) costs less than handing it to a thread and back."""

_CHUNK_CHARACTERS = 1 << 16
"""Texts of one Rust call. Its result takes some 100 bytes a token, so 2,048 long texts at once would take
hundreds of megabytes; and one call's chunks take turns with those of other calls."""

_GIANT_CHARACTERS = 1 << 20
"""A chunk (then a single text) from here on waits for its like: read whole, it takes seconds, and 60 times
its size in memory."""


R = TypeVar("R")


class TextThreads:
    """Work on the texts of a call in ``executor``, where up to ``width`` chunks run side by side."""

    def __init__(self, executor: Executor, width: int) -> None:
        self._executor = executor
        self._width = width
        self._giants = ThreadPoolExecutor(1, "giant-texts")

    def close(self) -> None:
        """Forget what waits. The executor given stays with its owner."""
        self._giants.shutdown(wait=False, cancel_futures=True)

    async def map(
        self, texts: Sequence[str], work: Callable[[Sequence[str]], list[R]], extra: int = 0
    ) -> list[R]:
        """Apply ``work``, one result per text, to chunks of ``texts``; few are worked on at once and here.

        ``extra`` are characters that ``work`` adds to each text. Raises ServiceError INPUT_INVALID for a text
        that is not Unicode (a lone surrogate).
        """
        if extra * len(texts) + sum(map(len, texts)) <= INLINE_CHARACTERS:
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

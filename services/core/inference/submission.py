"""How the inputs of a call go through a model: one ritual, whatever the model makes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeGuard, TypeVar

from services.core.call import Call
from services.core.catalog.types import InputType, Modality, ModelSpec
from services.core.content import Content, Fit, Group, Input, Media, Opened, Opener, Opening, Usage
from services.core.errors import ErrorCode, ServiceError, media_too_long
from services.core.inference.jobs import Job
from services.core.inference.slots import Slot
from services.core.inference.tokenizing import TextThreads
from services.core.modeling.types import (
    Columns,
    EncodeItem,
    PrepareOptions,
    Processor,
    TooLongError,
    UnfitInputError,
)

if TYPE_CHECKING:
    from services.core.inference.runtime import Reservation, Runtime

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")

CHARACTERS_PER_TOKEN = 4
"""To guess how much a call will queue before its tokens are counted."""


class Inputs(NamedTuple):
    """Contents of a call that are prepared alike.

    ``task`` None is the model's default; ``role`` is the side of a search that they stand on. ``limit`` is
    the longest sequence in tokens, 0 the model's own limit; of every text at least one token beside the
    specials is kept. ``copies`` says how often each content is billed, None once. ``name`` is what errors
    call one of them, before its number. ``multivector`` asks for a vector of each token.
    """

    contents: Sequence[Content]
    task: str | None = None
    limit: int = 0
    copies: Sequence[int] | None = None
    role: InputType = InputType.DOCUMENT
    name: str = "input"
    multivector: bool = False

    @property
    def options(self) -> PrepareOptions:
        """What the processor is told."""
        return PrepareOptions(self.task, self.role, self.limit, self.multivector)


class Expected(NamedTuple):
    """What a call will queue, as far as it can be known before it is prepared: items, and their cost.

    ``media`` are to be opened for it, each with what errors call it, and pictures fitted as ``fit`` says.
    """

    items: int
    cost: int
    media: Sequence[tuple[str, Media]] = ()
    fit: Fit | None = None


class Work(NamedTuple, Generic[T]):
    """What a call queues and what it is billed; ``detail`` is what else its results are to be read with."""

    prepared: Columns
    usage: Usage
    detail: T


class Applied(NamedTuple, Generic[T]):
    """Results of some work on contents: ``counts`` says how many of ``results`` are those of each content,
    one behind the other; more than one are those of the pages of a PDF."""

    results: list[T]
    counts: Sequence[int]


class NoOpener:
    """Opens nothing: for an engine whose models take texts only."""

    @asynccontextmanager
    async def open(
        self, named: Sequence[tuple[str, Media]], fit: Fit | None, call: Call
    ) -> AsyncGenerator[Opening]:
        """Refuse the first of them: ServiceError INPUT_INVALID."""
        for name, media in named:
            reason = (
                f"{name[:1].upper()}{name[1:]} is of kind '{media.kind}', which this server does not open."
            )
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=reason)
        yield NothingOpened()


class NothingOpened:
    """The opening of a call without media."""

    def take(self) -> tuple[Opened, ...]:
        """Raise IndexError: there is none."""
        raise IndexError("a call without media")

    def became(self, size: int) -> None:
        """Count nothing: what is there is part of no file."""

    def outlive(self) -> Callable[[], None]:
        """Return what has nothing to do."""
        return lambda: None


_NOTHING_OPENED = NothingOpened()


class Submission(Generic[P, R]):
    """One model of the process as calls use it, whatever its door: ``P`` is its processor, ``R`` a result.

    ``threads`` do the work of preparing; ``opener`` fetches and decodes media.
    """

    def __init__(
        self, spec: ModelSpec, slot: Slot[P, R], runtime: Runtime, threads: TextThreads, opener: Opener
    ) -> None:
        self.spec = spec
        self.threads = threads
        self._slot = slot
        self._runtime = runtime
        self._opener = opener

    async def run(
        self,
        call: Call,
        expected: Callable[[P], Expected],
        prepare: Callable[[P, Opening], Awaitable[Work[T]]],
    ) -> tuple[Work[T], list[R]]:
        """Hold the model, be admitted, open media, prepare, charge, queue, and wait for the results, one for
        each item.

        ``prepare`` takes the media in the order in which they were expected. Their bytes are counted from
        before they are fetched to the end of the passes that read them, whatever becomes of the call.

        Fills ``call.timings`` and awaits ``call.charge`` with the number of tokens before anything runs.
        Raises ServiceError: INPUT_INVALID for an input that the model cannot take or that is not Unicode,
        SERVICE_UNAVAILABLE with ``retry_after`` when the queue is full, the model cannot be loaded or the
        engine stops, SERVICE_TIMEOUT at ``call.deadline``, and what ``Opener.open``, ``prepare`` and
        ``charge`` raise.
        Cancelling takes the work that has not begun out of the queue.
        """
        async with self._slot.held(call) as processor:
            try:
                items, cost, media, fit = expected(processor)
                with self._runtime.admitted(self._slot.lane, items, cost, call.key_id) as reservation:
                    if not media:
                        return await self._queued(processor, prepare, None, reservation, call)
                    async with self._opener.open(media, fit, call) as opening:
                        return await self._queued(processor, prepare, opening, reservation, call)
            except UnfitInputError as unfit:
                raise ServiceError(ErrorCode.INPUT_INVALID, reason=str(unfit)) from None

    async def _queued(
        self,
        processor: P,
        prepare: Callable[[P, Opening], Awaitable[Work[T]]],
        opening: Opening | None,
        reservation: Reservation,
        call: Call,
    ) -> tuple[Work[T], list[R]]:
        began = time.monotonic()
        work = await prepare(processor, _NOTHING_OPENED if opening is None else opening)
        call.timings.tokenize += time.monotonic() - began
        items = work.prepared.items
        if opening is not None:
            opening.became(_feature_bytes(items))
        await call.charge(work.usage.total)
        reservation.counted()
        job = Job(self._slot.lane, items, work.prepared.costs, kind=items[0].adapter or "")
        try:
            return work, await self._runtime.run(job, call)
        finally:
            if opening is not None:
                self._runtime.when_over(job, opening.outlive())

    async def apply(
        self,
        contents: Sequence[Content],
        work: Callable[[Sequence[Input]], list[T]],
        opening: Opening,
        *,
        name: str = "input",
        extra: int = 0,
        key: Hashable = None,
    ) -> Applied[T]:
        """Apply ``work`` off the event loop, in chunks, to ``contents``, of which ``opening`` has the media.

        ``work`` gives one result for each input. Errors call a content by ``name`` and its number; ``extra``
        are characters that ``work`` adds to each text, and ``key`` is as of ``TextThreads.map``, as which it
        raises; also ServiceError for a medium that the model cannot take.
        """
        if are_texts(contents):
            results = await self.threads.map(contents, work, extra, key)
            return Applied(results, [1] * len(results))
        inputs = [_inputs(content, opening) for content in contents]
        flat = [each for several in inputs for each in several]
        names = [f"{name} {number}" for number, several in enumerate(inputs) for _ in several]
        return Applied(await self._apply_each(flat, names, work, extra), list(map(len, inputs)))

    async def _apply_each(
        self,
        inputs: Sequence[Input],
        names: Sequence[str],
        work: Callable[[Sequence[Input]], list[T]],
        extra: int,
    ) -> list[T]:
        """Apply ``work`` to texts together and to the others one by one, side by side."""
        others = [
            asyncio.ensure_future(self._apply_one(each, name, work))
            for each, name in zip(inputs, names, strict=True)
            if not isinstance(each, str)
        ]
        try:
            texts = [each for each in inputs if isinstance(each, str)]
            of_texts = iter(await self.threads.map(texts, work, extra))
            of_others = iter([result for (result,) in await asyncio.gather(*others)])
        finally:
            for future in others:
                future.cancel()
        return [next(of_texts) if isinstance(each, str) else next(of_others) for each in inputs]

    async def _apply_one(
        self, input: Input, name: str, work: Callable[[Sequence[Input]], list[T]]
    ) -> list[T]:
        try:
            return await self.threads.run(partial(work, [input]))
        except TooLongError as long:
            raise media_too_long(name, long.tokens, long.limit) from None
        except UnfitInputError as unfit:
            reason = f"{name[:1].upper()}{name[1:]} cannot be used: {unfit}"
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=reason) from None


def are_texts(contents: Sequence[Content]) -> TypeGuard[Sequence[str]]:
    """Whether all of ``contents`` are texts: what is then done with them needs no look at each."""
    return set(map(type, contents)) <= {str}


def expected_cost(processor: Processor, group: Inputs) -> int:
    """Guess what the items of a group will cost."""
    limit = processor.limit(group.options)
    if are_texts(group.contents):
        sizes = [1 + len(text) // CHARACTERS_PER_TOKEN for text in group.contents]
        return sum(sizes) if max(sizes, default=0) <= limit else sum(min(size, limit) for size in sizes)
    return sum(min(1 + guess(each, processor.expected), limit) for each in group.contents)


def guess(content: Content, expected: Callable[[Modality], int]) -> int:
    """Guess the tokens of a content before it is prepared; ``expected`` says it of media."""
    if isinstance(content, str):
        return len(content) // CHARACTERS_PER_TOKEN
    if isinstance(content, Media):
        return expected(content.kind)
    return sum(guess(part, expected) for part in content.parts)


def add_up(usages: Iterable[Usage], copies: Sequence[int] | None = None) -> Usage:
    """Sum usages, each so many times where ``copies`` are given."""
    rows: Iterable[Sequence[int]] = usages
    if copies is not None:
        rows = ([n * tokens for tokens in usage] for usage, n in zip(usages, copies, strict=True))
    return Usage(*map(sum, zip(*rows, strict=True)))


def named_media(contents: Sequence[Content], name: str) -> list[tuple[str, Media]]:
    """Return the media in ``contents`` in their order, each with what errors call it."""
    media: list[tuple[str, Media]] = []
    if are_texts(contents):
        return media
    for number, content in enumerate(contents):
        if isinstance(content, Media):
            media.append((f"{name} {number}", content))
        elif isinstance(content, Group):
            for part, inner in enumerate(content.parts):
                if isinstance(inner, Media):
                    media.append((f"part {part} of {name} {number}", inner))
    return media


def _feature_bytes(items: Iterable[EncodeItem]) -> int:
    """Return what all features take; items may share some."""
    data = [feature.data for item in items for feature in item.features]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in data}.values())


def _inputs(content: Content, opening: Opening) -> tuple[Input, ...]:
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Media):
        images = opening.take()
        return images if content.kind is Modality.PDF else images[:1]
    parts = [(part,) if isinstance(part, str) else opening.take() for part in content.parts]
    return (tuple(part for several in parts for part in several),)

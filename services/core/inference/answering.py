"""A model that answers, as calls use it: a conversation in, text out as it comes."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.content import Image, Media, Opener, Opening, Usage
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.generation import Conversation, Generation, Piece, Room
from services.core.inference.sampling import Sampler, Sampling
from services.core.inference.slots import Slot
from services.core.inference.submission import CHARACTERS_PER_TOKEN, NothingOpened
from services.core.inference.tokenizing import TextThreads
from services.core.inference.writing import Writer
from services.core.modeling.types import Message, PreparedChat, UnfitInputError

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime

_CHARGED_AT_ONCE = 16
"""Tokens of an answer that are booked together: to book each would cost more than to make it."""


class Turn(NamedTuple):
    """What one side of a conversation says: texts and media in order."""

    role: str
    parts: tuple[str | Media, ...]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """``most`` bounds the answer in tokens, None by what the conversation leaves of ``default``.

    ``stops`` end the answer and are not part of it. ``schema`` is a JSON schema that the answer is held to.
    ``seed`` None is another one each time.
    """

    most: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None


class Answer:
    """An answer on its way: an asynchronous iterator of its pieces.

    ``prompt`` is what the conversation takes; ``said`` counts the tokens of the answer so far. Iterating
    raises ServiceError: SERVICE_TIMEOUT at the call's deadline, SERVICE_UNAVAILABLE when the engine stops,
    and what the call's ``charge`` raises.
    """

    def __init__(self, sequence: Conversation, room: Room, call: Call) -> None:
        self._sequence = sequence
        self._room = room
        self._call = call
        self._charged = self._sent = 0
        self.prompt: Usage = sequence.prepared.usage
        self.shared = 0
        self.said = 0
        self.finish: str | None = None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    def text_of(self, id: int) -> bytes:
        """Return the bytes that a token writes."""
        return self._room.processor.pieces[id]

    async def _pieces(self) -> AsyncGenerator[Piece]:
        while self.finish is None:
            piece = await self._sequence.pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            self.shared = self._sequence.shared
            self.said += len(piece.tokens)
            self.finish = piece.finish
            if self.said - self._charged >= _CHARGED_AT_ONCE or piece.finish is not None:
                await self.charge()
            yield piece

    def sent(self, piece: Piece) -> None:
        """Note that the caller has been sent a piece: that much is billed however the call ends."""
        self._sent += len(piece.tokens)
        self._call.answered = self.prompt.total + self._sent

    async def charge(self) -> None:
        """Book what has not been booked of the answer."""
        tokens, self._charged = self.said - self._charged, self.said
        if tokens:
            self._call.usage_tokens += tokens
            await self._call.charge(tokens)


class ChatModel:
    """One model of the engine that answers. ``default`` bounds answers where a caller does not."""

    def __init__(
        self,
        spec: ModelSpec,
        slot: Slot[Room, Any],
        generation: Generation,
        runtime: Runtime,
        threads: TextThreads,
        opener: Opener,
    ) -> None:
        self.spec = spec
        self._slot = slot
        self._generation = generation
        self._runtime = runtime
        self._threads = threads
        self._opener = opener

    @asynccontextmanager
    async def answer(
        self, turns: Sequence[Turn], options: AnswerOptions, call: Call, *, default: int = 256
    ) -> AsyncGenerator[Answer]:
        """Begin an answer; leaving the context ends it, and books what was made of it.

        Fills ``call.timings`` and awaits ``call.charge`` with the tokens of the conversation before anything
        runs. Raises ServiceError: INPUT_INVALID for media or messages that the model cannot take,
        INPUT_TOKEN_LIMIT_EXCEEDED for a conversation that is too long with its answer, SERVICE_UNAVAILABLE
        with ``retry_after`` when too many wait or the model cannot be loaded, and what ``charge`` raises.
        """
        async with self._slot.held(call) as room:
            guess = sum(self._guess(room, part) for turn in turns for part in turn.parts)
            async with AsyncExitStack() as stack:
                reservation = stack.enter_context(
                    self._runtime.admitted(self._slot.lane, 1, guess, call.key_id)
                )
                opening: Opening = NothingOpened()
                if media := _media(turns):
                    opened = self._opener.open(media, room.processor.fit, call)
                    opening = await stack.enter_async_context(opened)
                try:
                    began = time.monotonic()
                    prepared = await self._prepared(room, turns, opening)
                    sampler = await self._sampler(room, options)
                    call.timings.tokenize += time.monotonic() - began
                except UnfitInputError as unfit:
                    raise ServiceError(ErrorCode.INPUT_INVALID, reason=str(unfit)) from None
                most = self._most(prepared, options.most, default)
                with self._generation.room_for(room, len(prepared.token_ids), most):
                    await call.charge(prepared.usage.total)
                    call.usage_tokens += prepared.usage.total
                    reservation.counted()
                    writer = Writer(room.processor.pieces, options.stops)
                    sequence = self._generation.submit(room, prepared, sampler, writer, most, call, opening)
                # Its pictures go when they have been looked at, long before the answer ends.
                del prepared
                answer = Answer(sequence, room, call)
                try:
                    yield answer
                finally:
                    await self._generation.leave(sequence)
                    await _booked(answer, sequence)

    def _guess(self, room: Room, part: str | Media) -> int:
        if isinstance(part, str):
            return len(part) // CHARACTERS_PER_TOKEN
        try:
            return room.processor.expected(part.kind)
        except UnfitInputError as unfit:
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=str(unfit)) from None

    def _most(self, prepared: PreparedChat, asked: int | None, default: int) -> int:
        limit, length = self.spec.max_tokens, len(prepared.token_ids)
        most = min(default, limit - length) if asked is None else asked
        if most < 1 or length + most > limit:
            actual = length + max(1, asked or 1)
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit, actual=actual)
        return most

    async def _prepared(self, room: Room, turns: Sequence[Turn], opening: Opening) -> PreparedChat:
        def part_of(part: str | Media) -> str | Image:
            if isinstance(part, str):
                return part
            (image, *_) = opening.take()
            assert isinstance(image, Image)
            return image

        messages = [Message(turn.role, tuple(map(part_of, turn.parts))) for turn in turns]
        prepared = await self._threads.run(partial(room.processor.prepare, messages))
        opening.became(sum(feature.data.nbytes for feature in prepared.features))
        return prepared

    async def _sampler(self, room: Room, options: AnswerOptions) -> Sampler:
        matcher = None
        if options.schema is not None:
            matcher = await self._threads.run(partial(room.grammars.matcher, options.schema))
        seed = secrets.randbits(63) if options.seed is None else options.seed
        return Sampler(replace(options.sampling, seed=seed), room.processor.ends, matcher)


def _media(turns: Sequence[Turn]) -> list[tuple[str, Media]]:
    return [
        (f"part {place} of message {number}", part)
        for number, turn in enumerate(turns)
        for place, part in enumerate(turn.parts)
        if isinstance(part, Media)
    ]


async def _booked(answer: Answer, sequence: Conversation) -> None:
    """Book what was made of an answer that nobody has waited for the end of."""
    answer.said = max(answer.said, len(sequence.said))
    booking = asyncio.ensure_future(answer.charge())
    try:
        await asyncio.shield(booking)
    except asyncio.CancelledError:
        await booking
        raise
    except ServiceError:
        # A key that has nothing left: there is no one to tell any more, and no more is made.
        return

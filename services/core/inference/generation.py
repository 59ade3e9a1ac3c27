"""Answers, token by token: which sequences share a step, who holds which memory, who waits.

One loop for each model plans a step, has a worker run it, and hands its tokens out. Sequences join and leave
between two steps. A step holds the next token of every answer and, in what room is left, chunks of prompts,
of the oldest and the shortest, so that neither running answers nor short prompts nor other calls of the
process wait for a long one. A sequence is let in when there are blocks for its prompt and its longest answer:
none is ever thrown out again. Waiting ones go by priority, then the keys in turn by the tokens that each has
been given.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.call import Call, Priority
from services.core.content import Opening
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.blocks import BlockPool, Key, block_key
from services.core.inference.jobs import Job, Lane
from services.core.inference.metrics import GenerationMetrics
from services.core.inference.sampling import Chosen, Grammars, Sampler
from services.core.inference.writing import Writer
from services.core.modeling.layers.causal import BLOCK, Chunk
from services.core.modeling.types import ChatProcessor, Feature, Generator, PreparedChat, UnfitInputError

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime

_MOST_RUNNING = 64
_CPU_STEP_TOKENS, _CUDA_STEP_TOKENS = 64, 1024
"""Tokens of a step: with so many a device is busy, and more would only be longer to wait for."""

_LEAST_PROMPT_TOKENS = 16
"""Of a step that running answers would fill."""

_RETRY_SOON, _RETRY_AT_MOST = 1.0, 60.0
_SEEN = torch.empty(0)


class Room(NamedTuple):
    """A model in memory: what a call that holds it works with."""

    processor: ChatProcessor
    generator: Generator
    pool: BlockPool
    grammars: Grammars
    step_tokens: int

    @classmethod
    def of(cls, generator: Generator, cache_bytes: int, most_tokens: int, *, on_cpu: bool) -> Room:
        """Take the memory for keys and values: ``cache_bytes``, or what full sequences can need.

        ValueError if that is less than one block.
        """
        needed = _MOST_RUNNING * -(-most_tokens // BLOCK)
        blocks = min(cache_bytes // generator.block_bytes, needed)
        if blocks < 1:
            raise ValueError(
                f"SF_CHAT_CACHE_BYTES is {cache_bytes:,}, and {BLOCK} tokens take {generator.block_bytes:,}"
            )
        generator.open_cache(blocks)
        step_tokens = _CPU_STEP_TOKENS if on_cpu else _CUDA_STEP_TOKENS
        return cls(
            generator.processor, generator, BlockPool(blocks), Grammars(generator.processor), step_tokens
        )


@dataclass(frozen=True, slots=True)
class Look:
    """One part of a picture for the tower."""

    generator: Generator
    feature: Feature
    part: int


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks for the decoder; for each that asks, who chooses, and what the answer has so far."""

    generator: Generator
    chunks: Sequence[Chunk]
    choosing: Sequence[tuple[Sampler, Sequence[int]]]


def run(work: Sequence[Look | Step]) -> list[Any]:
    """What the lane of a model that answers runs, in a worker: the states of a look, the tokens of a step."""
    return [_look(each) if isinstance(each, Look) else _step(each) for each in work]


def _look(work: Look) -> torch.Tensor:
    return work.generator.look(work.feature, work.part)


def _step(work: Step) -> list[Chosen | Exception]:
    logits = work.generator.step(work.chunks)
    likely = logits.argmax(dim=-1).tolist()
    chosen: list[Chosen | Exception] = []
    for row, (sampler, said) in enumerate(work.choosing):
        if sampler.plain:
            chosen.append(Chosen(likely[row]))
            continue
        try:
            chosen.append(sampler.choose(logits[row].cpu().numpy(), said))
        except Exception as error:  # noqa: BLE001  (whatever one asks for, the others of the step go on)
            chosen.append(error)
    return chosen


class Piece(NamedTuple):
    """What has come of an answer since the piece before: ``text``, and the tokens, which may be ahead of it.

    ``finish`` is ``stop`` or ``length`` in the last piece, else None.
    """

    text: str
    tokens: tuple[Chosen, ...]
    finish: str | None = None


@dataclass(eq=False, slots=True)
class Conversation:
    """One that is being answered. ``computed`` tokens are in the cache; ``keys`` name its full blocks."""

    call: Call
    prepared: PreparedChat
    opening: Opening
    sampler: Sampler
    writer: Writer
    most: int
    number: int
    keys: list[Key]
    pieces: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue[Any])
    said: list[int] = field(default_factory=list[int])
    blocks: list[int] = field(default_factory=list[int])
    table: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    states: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    looking: asyncio.Task[None] | None = None
    computed: int = 0
    shared: int = 0
    last: float = 0.0
    gone: bool = False
    finished: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt(self) -> NDArray[np.int32]:
        """Ids of the conversation."""
        return self.prepared.token_ids

    @property
    def prefilled(self) -> bool:
        """Whether all of the prompt but its last token is computed, as of every answer under way."""
        return bool(self.said)

    @property
    def unread(self) -> int:
        """How many tokens of the prompt are not computed."""
        return len(self.prompt) - self.computed

    @property
    def tokens(self) -> int:
        """What it takes of the cache at most."""
        return len(self.prompt) + self.most

    def forget_pictures(self) -> None:
        """Let go of what the tower reads, which has been looked at or is in the cache."""
        features = tuple(replace(each, data=_SEEN) for each in self.prepared.features)
        self.prepared = self.prepared._replace(features=features)
        self.opening.became(0)

    def said_from(self, position: int) -> NDArray[np.int32]:
        """Return the ids of the answer from a position of the whole on."""
        return np.array(self.said[max(0, position - len(self.prompt)) :], np.int32)


class Waiting:
    """Sequences that wait for blocks: interactive ones first, then the keys in turn."""

    def __init__(self) -> None:
        self._queues: dict[tuple[Priority, str], deque[Conversation]] = {}
        self._given: dict[str, float] = {}
        self.tokens = 0
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, sequence: Conversation) -> None:
        """Queue one. A key that comes back from idling starts where those that wait are."""
        tenant = sequence.call.key_id
        present = min((self._given[name] for _, name in self._queues), default=0.0)
        self._given[tenant] = max(self._given.get(tenant, 0.0), present)
        self._queues.setdefault((sequence.call.priority, tenant), deque()).append(sequence)
        self.tokens += sequence.tokens
        self.count += 1

    def first(self) -> Conversation:
        """Return who is next."""
        return self._queues[self._turn()][0]

    def take(self) -> Conversation:
        """Take out who is next."""
        key = self._turn()
        sequence = self._queues[key].popleft()
        if not self._queues[key]:
            del self._queues[key]
        self._given[key[1]] += sequence.tokens
        self._left(sequence)
        if not self._queues:
            self._given.clear()
        return sequence

    def discard(self, sequence: Conversation) -> bool:
        """Take one out of turn; says whether it was there."""
        key = (sequence.call.priority, sequence.call.key_id)
        if sequence not in self._queues.get(key, ()):
            return False
        self._queues[key].remove(sequence)
        if not self._queues[key]:
            del self._queues[key]
        self._left(sequence)
        return True

    def __iter__(self) -> Iterator[Conversation]:
        return iter([sequence for queue in self._queues.values() for sequence in queue])

    def _turn(self) -> tuple[Priority, str]:
        return min(self._queues, key=lambda key: (key[0], self._given[key[1]], self._queues[key][0].number))

    def _left(self, sequence: Conversation) -> None:
        self.tokens -= sequence.tokens
        self.count -= 1


class Generation:
    """The answers of one model. Used on the event loop.

    ``most_waiting`` bounds the tokens, prompts and longest answers, of those that wait.
    """

    def __init__(self, lane: Lane[Any, Any], runtime: Runtime, most_waiting: int) -> None:
        self._lane = lane
        self._runtime = runtime
        self._most_waiting = most_waiting
        self._waiting = Waiting()
        self._running: list[Conversation] = []
        self._numbers = count()
        self._pump: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()
        self._pace = 0.0
        self._promised = 0
        # A model that leaves memory is not kept there by its figures.
        self._pool: weakref.ref[BlockPool] | None = None
        self._metrics = GenerationMetrics(
            lane.name,
            running=lambda: len(self._running),
            waiting=lambda: self._waiting.count,
            waiting_tokens=lambda: self._waiting.tokens,
            blocks=lambda: 0 if (pool := self.pool) is None else pool.count - pool.available,
            all_blocks=lambda: 0 if (pool := self.pool) is None else pool.count,
        )

    @property
    def pool(self) -> BlockPool | None:
        """The blocks of the model, None before its first call and while it is not in memory."""
        return None if self._pool is None else self._pool()

    @contextmanager
    def room_for(self, room: Room, prompt: int, answer: int) -> Yields[None]:
        """Keep a conversation's place among those that wait until it is submitted.

        Raises ServiceError: INPUT_TOKEN_LIMIT_EXCEEDED for one that all of the cache could not hold,
        SERVICE_UNAVAILABLE with ``retry_after`` when too many wait.
        """
        tokens = prompt + answer
        self._check_room(room, tokens)
        self._promised += tokens
        try:
            yield
        finally:
            self._promised -= tokens

    def _check_room(self, room: Room, tokens: int) -> None:
        limit = room.pool.count * BLOCK
        if tokens > limit:
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit, actual=tokens)
        # Of those that wait, as many as would fill the cache once more.
        bound = min(self._most_waiting, limit)
        waiting = self._waiting.tokens + self._promised
        if waiting and waiting + tokens > bound:
            self._metrics.refused()
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=self._retry_after())

    def submit(
        self,
        room: Room,
        prepared: PreparedChat,
        sampler: Sampler,
        writer: Writer,
        most: int,
        call: Call,
        opening: Opening,
    ) -> Conversation:
        """Queue a conversation; its pieces, at last one with ``finish`` or an error, come in ``pieces``.

        ``room`` stays in memory until the caller has called ``leave``; ``opening`` counts its pictures.
        """
        number, keys = next(self._numbers), list(_keys(prepared, call.key_id))
        sequence = Conversation(call, prepared, opening, sampler, writer, most, number, keys)
        sequence.last = time.monotonic()
        self._pool = weakref.ref(room.pool)
        self._waiting.add(sequence)
        self._stirred.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._go_on(room))
        return sequence

    async def leave(self, sequence: Conversation) -> None:
        """Stop a sequence; behind the step that has it, which is waited for, its blocks are free."""
        sequence.gone = True
        if not sequence.finished and self._waiting.discard(sequence):
            sequence.finished = True
            sequence.over.set()
        self._stirred.set()
        await sequence.over.wait()

    # The loop

    async def _go_on(self, room: Room) -> None:
        """Run steps while there are sequences."""
        try:
            while self._running or self._waiting:
                self._stirred.clear()
                self._sweep(room)
                self._let_in(room)
                planned = self._plan(room)
                if planned:
                    await self._one_step(room, planned)
                elif self._running:
                    await self._stirred.wait()  # all of them wait for their pictures
        except BaseException as error:
            for sequence in [*self._running, *self._waiting]:
                self._waiting.discard(sequence)
                self._end(room, sequence, error if isinstance(error, Exception) else _unavailable())
            raise

    def _sweep(self, room: Room) -> None:
        """Let those go whose callers are gone, or whose time is over."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.gone:
                self._waiting.discard(sequence)
                self._end(room, sequence, None)
            elif sequence.call.expired:
                self._waiting.discard(sequence)
                call = sequence.call
                seconds = round((call.deadline or call.started) - call.started, 3)
                self._end(room, sequence, ServiceError(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=seconds))

    def _let_in(self, room: Room) -> None:
        """Give blocks to those that wait, in their order, as long as there are some."""
        while self._waiting and len(self._running) < _MOST_RUNNING:
            sequence = self._waiting.first()
            # The last token is computed anew in any case: its logits are what the answer begins with.
            shared = room.pool.shared(sequence.keys[: (len(sequence.prompt) - 1) // BLOCK])
            blocks = room.pool.take(shared, -(-sequence.tokens // BLOCK) - len(shared))
            if blocks is None:
                return
            self._waiting.take()
            now = time.monotonic()
            sequence.call.timings.queue += now - sequence.last
            sequence.last = now
            sequence.blocks, sequence.table = blocks, np.array(blocks, np.int32)
            sequence.computed = sequence.shared = len(shared) * BLOCK
            self._metrics.shared(sequence.shared)
            self._running.append(sequence)
            self._running.sort(key=lambda each: (each.call.priority, each.number))
            unseen = [f for f in sequence.prepared.features if f.offset + f.length > sequence.computed]
            if unseen:
                sequence.looking = asyncio.get_running_loop().create_task(
                    self._look_at(room, sequence, unseen)
                )
            else:
                sequence.forget_pictures()

    async def _look_at(self, room: Room, sequence: Conversation, features: Sequence[Feature]) -> None:
        """Have the tower run over pictures of a sequence, one part after the other."""
        try:
            for feature in features:
                parts: list[torch.Tensor] = []
                for part in range(room.generator.looks(feature)):
                    cost = max(1, feature.length // room.generator.looks(feature))
                    job = Job(self._lane, [Look(room.generator, feature, part)], [cost])
                    try:
                        parts += await self._runtime.run(job, sequence.call)
                    finally:
                        self._runtime.when_over(job, sequence.opening.outlive())
                sequence.states[feature.offset] = room.generator.seen(feature, parts)
                self._stirred.set()
            sequence.forget_pictures()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, the one call ends with it)
            if not sequence.finished:
                sequence.pieces.put_nowait(error)
            sequence.gone = True
            self._stirred.set()

    def _plan(self, room: Room) -> list[tuple[Conversation, Chunk]]:
        """Choose what the next step computes."""
        planned = [
            (sequence, Chunk(np.array(sequence.said[-1:], np.int32), sequence.computed, sequence.table))
            for sequence in self._running
            if sequence.prefilled
        ]
        left = max(room.step_tokens - len(planned), _LEAST_PROMPT_TOKENS)
        return planned + _prompt_chunks([each for each in self._running if not each.prefilled], left)

    async def _one_step(self, room: Room, planned: Sequence[tuple[Conversation, Chunk]]) -> None:
        chunks = [chunk for _, chunk in planned]
        asking = [sequence for sequence, chunk in planned if chunk.asks]
        step = Step(room.generator, chunks, [(each.sampler, tuple(each.said)) for each in asking])
        priority = min(sequence.call.priority for sequence, _ in planned)
        # The steps of a model are those of no one key: among the keys' other calls they are one more.
        call = Call("", key_id=f"answers of {self._lane.name}", priority=priority)
        began = time.monotonic()
        job = Job(self._lane, [step], [sum(len(chunk.ids) for chunk in chunks)])
        try:
            ((chosen),) = await self._runtime.run(job, call)
        except Exception as error:  # noqa: BLE001  (whatever it is, the calls of this step end with it)
            for sequence, _ in planned:
                self._end(room, sequence, error)
            return
        now = time.monotonic()
        self._pace += (now - began - self._pace) * (0.1 if self._pace else 1.0)
        self._metrics.stepped(len(chunks))
        for sequence, chunk in planned:
            sequence.call.timings.inference += now - began
            self._computed(room, sequence, chunk)
        for sequence, token in zip(asking, chosen, strict=True):
            if isinstance(token, UnfitInputError):
                self._end(room, sequence, ServiceError(ErrorCode.INPUT_INVALID, reason=str(token)))
            elif isinstance(token, Exception):
                self._end(room, sequence, token)
            else:
                self._said(room, sequence, token, now)

    def _computed(self, room: Room, sequence: Conversation, chunk: Chunk) -> None:
        """Note what is in the cache now, and name the blocks that are full."""
        before, sequence.computed = sequence.computed, chunk.end
        for full in range(before // BLOCK, sequence.computed // BLOCK):
            if full == len(sequence.keys):
                start = full * BLOCK
                ids = np.concatenate([sequence.prompt[start:], sequence.said_from(start)])[:BLOCK]
                before_it = sequence.keys[-1] if sequence.keys else sequence.call.key_id.encode()
                sequence.keys.append(block_key(before_it, ids, _pictures(sequence.prepared, start)))
            room.pool.name(sequence.blocks[full], sequence.keys[full])

    def _said(self, room: Room, sequence: Conversation, token: Chosen, now: float) -> None:
        """Take in the next token of an answer, and hand on what can be shown of it."""
        if sequence.gone:
            return
        since = sequence.last if sequence.said else sequence.call.started
        self._metrics.token(now - since, first=not sequence.said)
        sequence.last = now
        if token.id in sequence.sampler.ends:
            self._finish(room, sequence, (), "stop")
            return
        sequence.said.append(token.id)
        text = sequence.writer.add(token.id)
        if sequence.writer.stopped:
            self._finish(room, sequence, (token,), "stop", text)
        elif len(sequence.said) == sequence.most:
            self._finish(room, sequence, (token,), "length", text)
        else:
            sequence.pieces.put_nowait(Piece(text, (token,)))

    def _finish(
        self, room: Room, sequence: Conversation, tokens: tuple[Chosen, ...], why: str, text: str = ""
    ) -> None:
        sequence.pieces.put_nowait(Piece(text + sequence.writer.finish(), tokens, why))
        self._end(room, sequence, None)

    def _end(self, room: Room, sequence: Conversation, error: BaseException | None) -> None:
        """Let go of what a sequence holds. Not while a step that has it is under way."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.looking is not None:
            sequence.looking.cancel()
        if error is not None:
            sequence.pieces.put_nowait(error)
        if sequence in self._running:
            self._running.remove(sequence)
        room.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.states.clear()
        sequence.over.set()

    def _retry_after(self) -> float:
        """About how long until the first of the running answers has made room."""
        left = min((each.most - len(each.said) for each in self._running), default=1)
        return min(max(left * self._pace, _RETRY_SOON), _RETRY_AT_MOST)


def _unavailable() -> ServiceError:
    return ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=_RETRY_SOON)


def _keys(prepared: PreparedChat, key_id: str) -> Iterator[Key]:
    """Name the full blocks of a prompt.

    Nobody shares those of another API key: by what is in memory one could guess what others have asked.
    """
    key = key_id.encode()
    for start in range(0, len(prepared.token_ids) - BLOCK + 1, BLOCK):
        key = block_key(key, prepared.token_ids[start : start + BLOCK], _pictures(prepared, start))
        yield key


def _pictures(prepared: PreparedChat, start: int) -> list[tuple[int, bytes]]:
    """The pictures in the block from ``start`` on, each with where it begins as seen from there."""
    return [
        (feature.offset - start, feature.digest)
        for feature in prepared.features
        if feature.offset < start + BLOCK and feature.offset + feature.length > start
    ]


def _prompt_chunks(reading: Sequence[Conversation], left: int) -> list[tuple[Conversation, Chunk]]:
    """Share ``left`` tokens of a step among prompts, the oldest first.

    Half is for the oldest, the rest for those that have least to read: a short one does not wait for the end
    of a long one, and a long one goes on however many short ones come.
    """
    if not reading:
        return []
    oldest, *others = reading
    chunks: list[tuple[Conversation, Chunk]] = []
    most = _prompt_chunk(oldest, left)
    spare = left - min(-(-left // 2), 0 if most is None else len(most.ids))
    for sequence in sorted(others, key=lambda each: (each.call.priority, each.unread)):
        if spare > 0 and (chunk := _prompt_chunk(sequence, spare)) is not None:
            chunks.append((sequence, chunk))
            spare -= len(chunk.ids)
            left -= len(chunk.ids)
    if (chunk := _prompt_chunk(oldest, left)) is not None:
        chunks.append((oldest, chunk))
    return chunks


def _prompt_chunk(sequence: Conversation, most: int) -> Chunk | None:
    """Return the next tokens of a prompt, up to a picture that has not been looked at; None for none."""
    start, prompt = sequence.computed, sequence.prompt
    end = min(start + most, len(prompt))
    states: list[tuple[int, torch.Tensor]] = []
    for feature in sequence.prepared.features:
        if feature.offset >= end or feature.offset + feature.length <= start:
            continue
        seen = sequence.states.get(feature.offset)
        if seen is None:
            end = min(end, max(feature.offset, start))
            break
        first, last = max(start, feature.offset), min(end, feature.offset + feature.length)
        states.append((first - start, seen[first - feature.offset : last - feature.offset]))
    if end <= start:
        return None
    return Chunk(prompt[start:end], start, sequence.table, asks=end == len(prompt), states=tuple(states))

"""Embedding texts with one loaded model, and finishing the vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.catalog.types import InputType, ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.jobs import Job
from services.core.inference.late_chunking import join_chunks
from services.core.inference.slots import Slot
from services.core.inference.tokenizing import TextThreads, TokenizeStage
from services.core.modeling.types import EncodeItem, Encoding, Tokens

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime

Vectors = NDArray[np.float32]

CHARACTERS_PER_TOKEN = 4
"""To guess how much a call will queue before its tokens are counted."""


class NotANumberError(ArithmeticError):
    """A model's numbers cannot be answered: JSON has no word for them."""


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """``task`` None is the model's default; ``truncate`` cuts a text that is too long instead of failing.

    With ``late_chunking`` all texts are read as one, and each vector is the mean of its text's part of that.
    """

    task: str | None = None
    truncate: bool = False
    late_chunking: bool = False


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``vectors`` (texts, width) fp32 as the model pooled them, not normalised; ``token_counts`` per text.

    Counts include special tokens and prompts, and stop at what the model saw of a text that was cut.
    """

    vectors: Vectors
    token_counts: list[int]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of a call that are made into tokens alike.

    ``task`` None is the model's default; ``role`` is the side of a search that they stand on. ``limit`` is
    the longest text in tokens, 0 the model's own limit; of every text at least one token beside the specials
    is kept. ``copies`` says how often each text is billed, None once.
    """

    texts: Sequence[str]
    task: str | None = None
    limit: int = 0
    copies: Sequence[int] | None = None
    role: InputType = InputType.DOCUMENT


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the model made of each text, the tokens of each, and how many tokens were billed in all.

    ``token_names`` gives the tokens of ids as the vocabulary writes them.
    """

    results: list[Encoding]
    token_counts: list[int]
    billed: int
    token_names: Callable[[Sequence[int]], list[str]]


Stages = Mapping[InputType, TokenizeStage]
"""Of a model in memory, what makes tokens of its documents and of its queries."""


class EmbeddingModel:
    """A text embedding model, loaded when it has to be, behind the queue it shares with others."""

    def __init__(
        self,
        spec: ModelSpec,
        slot: Slot[Stages, Encoding],
        threads: TextThreads,
        runtime: Runtime,
    ) -> None:
        self.spec = spec
        self.threads = threads
        self._slot = slot
        self._runtime = runtime

    async def embed(self, texts: Sequence[str], options: EmbedOptions, call: Call) -> Embeddings:
        """Embed ``texts``, of a model that makes one dense vector of each; the order is kept.

        Fills ``call.timings`` and awaits ``call.charge`` with the number of tokens before anything runs.
        Raises ServiceError: INPUT_TOKEN_LIMIT_EXCEEDED for a text that is too long, INPUT_INVALID for one
        that is not Unicode, SERVICE_UNAVAILABLE with ``retry_after`` when the queue is full or the engine
        stops, SERVICE_TIMEOUT at ``call.deadline``, and what ``charge`` raises. Cancelling takes the work
        that has not begun out of the queue.
        """
        if not texts:
            return Embeddings(np.empty((0, self.spec.dimensions), np.float32), [])
        if options.late_chunking:
            async with self._slot.held(call) as stages:
                return await self._embed_chunks(stages, texts, options, call)
        encoded = await self.encode([Texts(texts, options.task)], options.truncate, call)
        return Embeddings(_stack(encoded.results), encoded.token_counts)

    async def encode(self, groups: Sequence[Texts], truncate: bool, call: Call) -> Encoded:
        """Run all texts of ``groups``, of which there is at least one, in one job; the order is kept.

        Everything else is as ``embed`` says.
        """
        async with self._slot.held(call) as stages:
            return await self._encode(stages, groups, truncate, call)

    async def _encode(self, stages: Stages, groups: Sequence[Texts], truncate: bool, call: Call) -> Encoded:
        count = sum(len(group.texts) for group in groups)
        expected = sum(self._guess(stages, group) for group in groups)
        with self._runtime.admitted(self._slot.lane, count, expected, call.tenant) as ticket:
            items: list[EncodeItem] = []
            counts: list[int] = []
            billed = 0
            for group in groups:
                tokens = await self._tokenize(stages, group, truncate, call)
                adapter = self.spec.adapter(group.task)
                items += [EncodeItem(each.ids, adapter) for each in tokens]
                lengths = [min(each.length, len(each.ids)) for each in tokens]
                counts += lengths
                billed += sum(lengths if group.copies is None else map(mul, lengths, group.copies))
            await call.charge(billed)
            ticket.counted()
            results = await self._run(items, call)
        return Encoded(results, counts, billed, stages[InputType.DOCUMENT].names)

    async def _embed_chunks(
        self, stages: Stages, texts: Sequence[str], options: EmbedOptions, call: Call
    ) -> Embeddings:
        """Run ``texts`` as one, the prompt before the first; errors are as of one text."""
        first, rest = Texts(texts[:1], options.task), Texts(texts[1:])
        expected = min(self._guess(stages, first) + self._guess(stages, rest), self._limit(stages, first))
        with self._runtime.admitted(self._slot.lane, 1, expected, call.tenant) as ticket:
            tokens = await self._tokenize(stages, first, True, call)
            tokens += await self._tokenize(stages, rest, True, call, prompt="")
            stage = stages[InputType.DOCUMENT]
            chunks = join_chunks(tokens, stage.prefix_length, stage.suffix_length, self.spec.max_tokens)
            if not options.truncate and chunks.truncated:
                raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=self.spec.max_tokens)
            await call.charge(len(chunks.ids))
            ticket.counted()
            item = EncodeItem(chunks.ids, self.spec.adapter(options.task), chunks.spans)
            (vectors,) = await self._run([item], call)
        return Embeddings(cast(Vectors, vectors), [end - start for start, end in chunks.spans])

    async def _run(self, items: Sequence[EncodeItem], call: Call) -> list[Encoding]:
        job = Job(self._slot.lane, items, [len(item.token_ids) for item in items])
        return await self._runtime.run(job, call)

    def _guess(self, stages: Stages, group: Texts) -> int:
        limit = self._limit(stages, group)
        return sum(min(1 + len(text) // CHARACTERS_PER_TOKEN, limit) for text in group.texts)

    def _limit(self, stages: Stages, group: Texts) -> int:
        longest = self.spec.max_tokens
        return max(min(group.limit or longest, longest), stages[group.role].shortest_limit)

    async def _tokenize(
        self, stages: Stages, group: Texts, truncate: bool, call: Call, *, prompt: str | None = None
    ) -> list[Tokens]:
        """Tokenise a group, behind the task's prompt unless another is given."""
        began = time.monotonic()
        limit = self._limit(stages, group)
        before = self.spec.prompt(group.task) if prompt is None else prompt
        tokens = await stages[group.role].encode(group.texts, before, limit)
        call.timings.tokenize += time.monotonic() - began
        if not truncate and any(each.truncated for each in tokens):
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit)
        return tokens


def _stack(results: Sequence[Encoding]) -> Vectors:
    rows = cast("Sequence[Vectors]", results)
    return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)


def finish(vectors: Vectors, *, dimensions: int | None = None, normalized: bool = True) -> Vectors:
    """Cut ``vectors`` (n, width) fp32 to their first ``dimensions`` and then scale them to unit length.

    A vector of zeros stays as it is.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if not normalized:
        return vectors
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    lengths[lengths == 0.0] = 1.0
    return vectors / lengths[:, np.newaxis]


def require_finite(numbers: Vectors, model: str) -> None:
    """Raise NotANumberError unless all ``numbers`` that ``model`` made are finite."""
    if not np.isfinite(numbers).all():
        raise NotANumberError(f"{model} made numbers that are not finite")

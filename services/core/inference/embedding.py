"""Embedding contents with one model, and finishing the vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.content import Content, Media, Opening, Usage
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.late_chunking import join_chunks
from services.core.inference.submission import (
    Expected,
    Inputs,
    Submission,
    Work,
    add_up,
    expected_cost,
    named_media,
)
from services.core.inference.tokenizing import runs_of
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.types import Columns, EncodeItem, Encoding, Prepared, Processor, TokenIds

Vectors = NDArray[np.float32]
TokenNames = Callable[[Sequence[int]], list[str]]


MAX_TOKEN_NUMBERS = 1 << 24
"""Numbers in the vectors of all tokens of a call, where a model that pools gives them: 64 MiB."""


class NotANumberError(ArithmeticError):
    """A model's numbers cannot be answered: JSON has no word for them."""


class EmbedOptions(NamedTuple):
    """``task`` None is the model's default; ``truncate`` cuts a text that is too long instead of failing.

    With ``late_chunking`` all texts are read as one, and each vector is the mean of its text's part of that.
    ``dimensions`` and ``normalized`` are as ``finish`` takes them; by default vectors are as pooled.
    """

    task: str | None = None
    truncate: bool = False
    late_chunking: bool = False
    dimensions: int | None = None
    normalized: bool = False


class Embeddings(NamedTuple):
    """``vectors`` (results, width) fp32: one of each content in order, of a PDF one for each page.

    ``counts`` says how many of them are those of each content. ``usages`` has the tokens of each result, with
    specials and prompts, up to what the model saw of a text that was cut; ``usage`` what was billed for all.
    """

    vectors: Vectors
    counts: Sequence[int]
    usages: Sequence[Usage]
    usage: Usage

    @property
    def token_counts(self) -> list[int]:
        """The tokens of each result, of all modalities."""
        return [each.total for each in self.usages]


class Encoded(NamedTuple):
    """What the model made of each content; ``counts``, ``usages`` and ``usage`` are as of ``Embeddings``.

    ``items`` are what the network read for each result; ``token_names`` gives the tokens of ids as the
    vocabulary writes them.
    """

    results: list[Encoding]
    counts: Sequence[int]
    items: Sequence[EncodeItem]
    usages: Sequence[Usage]
    usage: Usage
    token_names: TokenNames

    @property
    def token_ids(self) -> list[TokenIds]:
        """The ids of the tokens of each result, specials included."""
        return [item.token_ids for item in self.items]

    @property
    def token_counts(self) -> list[int]:
        """The tokens of each result, of all modalities."""
        return [each.total for each in self.usages]


class EmbeddingModel:
    """A model that embeds, loaded when it has to be, behind the queue it shares with others."""

    def __init__(self, submission: Submission[Processor, Encoding]) -> None:
        self.spec = submission.spec
        self.threads = submission.threads
        self._submission = submission

    async def embed(self, contents: Sequence[Content], options: EmbedOptions, call: Call) -> Embeddings:
        """Embed ``contents`` with a model that makes dense vectors; the order is kept.

        Raises as ``Submission.run`` does, also ServiceError INPUT_TOKEN_LIMIT_EXCEEDED for a text that is too
        long, and NotANumberError.
        """
        if not contents:
            width = options.dimensions or self.spec.dimensions
            return Embeddings(np.empty((0, width), np.float32), [], [], Usage())
        if options.late_chunking:
            found = await self._embed_chunks(contents, options, call)
            vectors = found.vectors
        else:
            found = await self.encode([Inputs(contents, options.task)], options.truncate, call)
            vectors = _stack(found.results)
        vectors = finish(vectors, dimensions=options.dimensions, normalized=options.normalized)
        require_finite(vectors, self.spec.id)
        return Embeddings(vectors, found.counts, found.usages, found.usage)

    async def vectors(self, groups: Sequence[Inputs], truncate: bool, call: Call) -> Embeddings:
        """Embed all of ``groups``, of which there is at least one, in one job, as vectors of length 1.

        Raises as ``embed`` does.
        """
        encoded = await self.encode(groups, truncate, call)
        vectors = finish(_stack(encoded.results))
        require_finite(vectors, self.spec.id)
        return Embeddings(vectors, encoded.counts, encoded.usages, encoded.usage)

    async def encode(self, groups: Sequence[Inputs], truncate: bool, call: Call) -> Encoded:
        """Run all of ``groups``, of which there is at least one, in one job; any kind of result will do.

        The order is kept. Raises as ``embed`` does.
        """

        def expected(processor: Processor) -> Expected:
            count = cost = 0
            media: list[tuple[str, Media]] = []
            for group in groups:
                count += len(group.contents)
                cost += expected_cost(processor, group)
                media += named_media(group.contents, group.name)
            return Expected(count, cost, media, processor.fit)

        async def prepare(processor: Processor, opening: Opening) -> Work[tuple[TokenNames, Sequence[int]]]:
            works = [await self._prepared(processor, group, truncate, opening) for group in groups]
            work = works[0] if len(works) == 1 else _one_behind_the_other(works)
            return Work(work.prepared, work.usage, (processor.names, work.detail))

        work, results = await self._submission.run(call, expected, prepare)
        names, counts = work.detail
        return Encoded(results, counts, work.prepared.items, work.prepared.usages, work.usage, names)

    async def _prepared(
        self, processor: Processor, group: Inputs, truncate: bool, opening: Opening
    ) -> Work[Sequence[int]]:
        options, copies = group.options, group.copies
        applied = await self._submission.apply(
            group.contents,
            lambda part: processor.prepare(part, options),
            opening,
            name=group.name,
            extra=len(self.spec.prompt(group.task)),
            key=(id(processor), options),
        )
        prepared = Columns.of(applied.results)
        if not truncate and any(prepared.truncated):
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=processor.limit(options))
        tokens = sum(prepared.results) if group.multivector else 0
        if tokens * self.spec.dimensions > MAX_TOKEN_NUMBERS:
            most = MAX_TOKEN_NUMBERS // self.spec.dimensions
            reason = f"These texts have {tokens:,} tokens, and a call can have the vectors of {most:,}."
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=reason)
        if copies is not None and len(prepared.items) > len(copies):
            copies = np.repeat(copies, applied.counts).tolist()
        return Work(prepared, add_up(prepared.usages, copies), applied.counts)

    async def _embed_chunks(
        self, contents: Sequence[Content], options: EmbedOptions, call: Call
    ) -> Embeddings:
        """Run ``contents``, which have to be texts, as one, the prompt before the first."""
        if any(not isinstance(content, str) for content in contents):
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="Late chunking reads texts only.")
        texts = cast("Sequence[str]", contents)
        whole = Inputs(texts, options.task)

        def expected(processor: Processor) -> Expected:
            return Expected(1, min(expected_cost(processor, whole), processor.limit(whole.options)))

        async def prepare(processor: Processor, _: Opening) -> Work[None]:
            chunks = await self._joined(cast(TextProcessor, processor), texts, options)
            return Work(Columns.of([chunks]), chunks.usage, None)

        work, (vectors,) = await self._submission.run(call, expected, prepare)
        spans = work.prepared.items[0].spans or ()
        usages = [Usage(end - start) for start, end in spans]
        return Embeddings(cast(Vectors, vectors), [1] * len(spans), usages, work.usage)

    async def _joined(
        self, processor: TextProcessor, texts: Sequence[str], options: EmbedOptions
    ) -> Prepared:
        prepare = Inputs(texts, options.task).options
        prompt = self.spec.prompt(options.task)
        run = self.threads.map
        written, limit = processor.documents, self.spec.max_tokens
        tokens = await run(texts[:1], lambda part: processor.tokenize(part, prompt, prepare), len(prompt))
        for part in runs_of(texts[1:]):
            # All share one context: what lies beyond it is left out, or refused, without being read.
            if sum(len(each.ids) - written.special_length for each in tokens) > limit:
                break
            tokens += await run(part, lambda part: processor.tokenize(part, "", prepare))
        suffix = written.special_length - written.prefix_length
        chunks = join_chunks(tokens, written.prefix_length, suffix, limit, len(texts))
        if not options.truncate and chunks.truncated:
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=self.spec.max_tokens)
        item = EncodeItem(chunks.ids, self.spec.adapter(options.task), chunks.spans)
        return Prepared(item, Usage(len(chunks.ids)), chunks.truncated, len(chunks.spans))


def _one_behind_the_other(works: Sequence[Work[Sequence[int]]]) -> Work[Sequence[int]]:
    prepared = Columns(*map(_chained, zip(*(work.prepared for work in works), strict=True)))
    return Work(prepared, add_up([work.usage for work in works]), _chained(work.detail for work in works))


def _chained(parts: Iterable[Sequence[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def _stack(results: Sequence[Encoding]) -> Vectors:
    rows = cast("Sequence[Vectors]", results)
    # As np.stack, which looks at each row in Python first.
    return rows[0][np.newaxis] if len(rows) == 1 else np.concatenate(rows).reshape(len(rows), -1)


def finish(vectors: Vectors, *, dimensions: int | None = None, normalized: bool = True) -> Vectors:
    """Cut ``vectors`` (n, width) fp32 to their first ``dimensions`` and then scale them to unit length.

    A vector of zeros stays as it is.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if not normalized:
        return vectors
    lengths = np.sqrt(np.vecdot(vectors, vectors))
    lengths[lengths == 0.0] = 1.0
    return vectors / lengths[:, np.newaxis]


def require_finite(numbers: Vectors, model: str) -> None:
    """Raise NotANumberError unless all ``numbers`` that ``model`` made are finite."""
    if not np.isfinite(numbers).all():
        raise NotANumberError(f"{model} made numbers that are not finite")

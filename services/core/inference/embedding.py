"""Embedding contents with one model, and finishing the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.content import Content, Opening, Usage
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
from services.core.modeling.types import Cost, EncodeItem, Encoding, Prepared, Processor, TokenIds

Vectors = NDArray[np.float32]
TokenNames = Callable[[Sequence[int]], list[str]]


MAX_TOKEN_NUMBERS = 1 << 24
"""Numbers in the vectors of all tokens of a call, where a model that pools gives them: 64 MiB."""


class NotANumberError(ArithmeticError):
    """A model's numbers cannot be answered: JSON has no word for them."""


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """``task`` None is the model's default; ``truncate`` cuts a text that is too long instead of failing.

    With ``late_chunking`` all texts are read as one, and each vector is the mean of its text's part of that.
    ``dimensions`` and ``normalized`` are as ``finish`` takes them; by default vectors are as pooled.
    """

    task: str | None = None
    truncate: bool = False
    late_chunking: bool = False
    dimensions: int | None = None
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``vectors`` (results, width) fp32: one of each content in order, of a PDF one for each page.

    ``counts`` says how many of them are those of each content. ``usages`` has the tokens of each result, with
    specials and prompts, up to what the model saw of a text that was cut; ``usage`` what was billed for all.
    """

    vectors: Vectors
    counts: list[int]
    usages: list[Usage]
    usage: Usage

    @property
    def token_counts(self) -> list[int]:
        """The tokens of each result, of all modalities."""
        return [each.total for each in self.usages]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the model made of each content; ``counts``, ``usages`` and ``usage`` are as of ``Embeddings``.

    ``token_ids`` are those that the network read for each result; ``token_names`` gives the tokens of ids as
    the vocabulary writes them.
    """

    results: list[Encoding]
    counts: list[int]
    token_ids: list[TokenIds]
    usages: list[Usage]
    usage: Usage
    token_names: TokenNames

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
        else:
            encoded = await self.encode([Inputs(contents, options.task)], options.truncate, call)
            found = _embeddings(encoded, _stack(encoded.results))
        vectors = finish(found.vectors, dimensions=options.dimensions, normalized=options.normalized)
        require_finite(vectors, self.spec.id)
        return replace(found, vectors=vectors)

    async def vectors(self, groups: Sequence[Inputs], truncate: bool, call: Call) -> Embeddings:
        """Embed all of ``groups``, of which there is at least one, in one job, as vectors of length 1.

        Raises as ``embed`` does.
        """
        encoded = await self.encode(groups, truncate, call)
        vectors = finish(_stack(encoded.results))
        require_finite(vectors, self.spec.id)
        return _embeddings(encoded, vectors)

    async def encode(self, groups: Sequence[Inputs], truncate: bool, call: Call) -> Encoded:
        """Run all of ``groups``, of which there is at least one, in one job; any kind of result will do.

        The order is kept. Raises as ``embed`` does.
        """

        def expected(processor: Processor) -> Expected:
            count = sum(len(group.contents) for group in groups)
            cost = sum(expected_cost(processor, group) for group in groups)
            media = [each for group in groups for each in named_media(group.contents, group.name)]
            return Expected(count, cost, media, processor.fit)

        async def prepare(processor: Processor, opening: Opening) -> Work[tuple[TokenNames, list[int]]]:
            works = [await self._prepared(processor, group, truncate, opening) for group in groups]
            prepared = [each for work in works for each in work.prepared]
            counts = [count for work in works for count in work.detail]
            return Work(prepared, add_up(work.usage for work in works), (processor.names, counts))

        work, results = await self._submission.run(call, expected, prepare)
        names, counts = work.detail
        ids = [each.item.token_ids for each in work.prepared]
        return Encoded(results, counts, ids, [each.usage for each in work.prepared], work.usage, names)

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
        prepared = applied.results
        if not truncate and any(each.truncated for each in prepared):
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=processor.limit(options))
        tokens = sum(each.results for each in prepared) if group.multivector else 0
        if tokens * self.spec.dimensions > MAX_TOKEN_NUMBERS:
            most = MAX_TOKEN_NUMBERS // self.spec.dimensions
            reason = f"These texts have {tokens:,} tokens, and a call can have the vectors of {most:,}."
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=reason)
        if copies is not None and len(prepared) > len(copies):
            copies = np.repeat(copies, applied.counts).tolist()
        return Work(prepared, add_up((each.usage for each in prepared), copies), applied.counts)

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
            return Work([chunks], chunks.usage, None)

        work, (vectors,) = await self._submission.run(call, expected, prepare)
        spans = work.prepared[0].item.spans or ()
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
        size = len(chunks.ids)
        return Prepared(item, Cost(size), Usage(size), chunks.truncated, len(chunks.spans))


def _embeddings(encoded: Encoded, vectors: Vectors) -> Embeddings:
    return Embeddings(vectors, encoded.counts, encoded.usages, encoded.usage)


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

"""Scoring documents by networks that read many of them together with the query, block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.embedding import CHARACTERS_PER_TOKEN, Vectors, finish, require_finite
from services.core.inference.jobs import Job
from services.core.inference.scoring import ScoreOptions, Scores
from services.core.inference.slots import Slot
from services.core.inference.tokenizing import TextThreads
from services.core.modeling.families.listwise import CutText, ListTokenizer, prompt
from services.core.modeling.types import EncodeItem, TokenIds

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime

_BLOCK_DOCUMENTS = 125
"""Documents of one block, by the published code."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    billed: int
    blocks: list[TokenIds]


class ListScorer:
    """A listwise reranker, loaded when it has to be; scores lie between -1 and 1.

    A document's score depends on what else is in its block and where it stands there, so equal documents may
    get different scores. Each block is an item of the queue: work of other calls runs between two of them.
    """

    def __init__(
        self, spec: ModelSpec, slot: Slot[ListTokenizer, Vectors], threads: TextThreads, runtime: Runtime
    ) -> None:
        self.spec = spec
        self._slot = slot
        self._threads = threads
        self._runtime = runtime

    async def score(self, query: str, documents: Sequence[str], options: ScoreOptions, call: Call) -> Scores:
        """Score ``documents``; see ``Scorer.score``."""
        async with self._slot.held(call) as tokenizer:
            return await self._score(tokenizer, query, documents, options, call)

    async def _score(
        self,
        tokenizer: ListTokenizer,
        query: str,
        documents: Sequence[str],
        options: ScoreOptions,
        call: Call,
    ) -> Scores:
        expected = 1 + (2 * len(query) + sum(map(len, documents))) // CHARACTERS_PER_TOKEN
        blocks = 1 + len(documents) // _BLOCK_DOCUMENTS
        with self._runtime.admitted(self._slot.lane, blocks, expected, call.tenant) as ticket:
            prepared = await self._prepare(tokenizer, query, documents, options, call)
            await call.charge(prepared.billed)
            ticket.counted()
            items = [EncodeItem(ids) for ids in prepared.blocks]
            job = Job(self._slot.lane, items, [len(ids) for ids in prepared.blocks])
            vectors = await self._runtime.run(job, call)
        values, found = fuse(vectors)
        require_finite(values, self.spec.id)
        return Scores(values, prepared.billed, finish(found) if options.return_embeddings else None)

    async def _prepare(
        self,
        tokenizer: ListTokenizer,
        query: str,
        documents: Sequence[str],
        options: ScoreOptions,
        call: Call,
    ) -> _Prepared:
        """Cut the texts and write the prompts of all blocks."""
        began = time.monotonic()
        longest = options.max_document_length or self.spec.max_document_length or self.spec.max_tokens
        query_limit = self.spec.max_query_length or self.spec.max_tokens
        (asked,) = await self._threads.map([query], lambda one: tokenizer.cut(one, query_limit))
        cut = await self._threads.map(documents, lambda part: tokenizer.cut(part, longest))
        if not options.truncate and (asked.truncated or any(text.truncated for text in cut)):
            limit = query_limit if asked.truncated else longest
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit)
        room = self.spec.max_tokens - 2 * asked.length
        prompts = [
            prompt(asked.text, [text.text for text in block]) for block in blocks_of(cut, room, longest)
        ]
        ids = await self._threads.map(prompts, tokenizer.prompts)
        call.timings.tokenize += time.monotonic() - began
        return _Prepared(asked.length + sum(text.length for text in cut), ids)


def blocks_of(documents: Sequence[CutText], room: int, longest: int) -> list[list[CutText]]:
    """Cut ``documents`` into blocks, in order.

    A block is closed when it has its number of documents, or when what is left of ``room`` tokens might not
    hold another one of ``longest`` tokens.
    """
    blocks: list[list[CutText]] = [[]]
    left = room
    for document in documents:
        if blocks[-1] and (len(blocks[-1]) >= _BLOCK_DOCUMENTS or left <= longest):
            blocks.append([])
            left = room
        blocks[-1].append(document)
        left -= document.length
    return blocks


def fuse(blocks: Sequence[Vectors]) -> tuple[Vectors, Vectors]:
    """Return the scores of all documents (documents,) and their vectors (documents, width), fp32.

    Each block is (1 + documents, width), the query first. The query of the whole list is the mean of the
    blocks' queries, each weighted by how well the best document of its block fits, from 0 to 1.
    """
    queries = np.stack([block[0] for block in blocks])
    weights = [float(1.0 + _cosines(block[0], block[1:]).max()) / 2.0 for block in blocks]
    documents = np.concatenate([block[1:] for block in blocks])
    # Without any weight no block has a say before the others.
    query = np.average(queries, axis=0, weights=weights if sum(weights) > 0.0 else None)
    return _cosines(query.astype(np.float32), documents), documents


def _cosines(query: Vectors, documents: Vectors) -> Vectors:
    # einsum stays in this thread; a matrix product may wake up a pool of threads that the workers need.
    (unit,) = finish(query[np.newaxis])
    return np.einsum("ij,j->i", finish(documents), unit).clip(-1.0, 1.0)

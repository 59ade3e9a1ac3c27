"""Scoring documents by networks that read each of them together with the query."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.embedding import CHARACTERS_PER_TOKEN, require_finite
from services.core.inference.jobs import Job
from services.core.inference.scoring import ScoreOptions, Scores, distinct
from services.core.inference.slots import Slot
from services.core.inference.tokenizing import TextThreads
from services.core.modeling.families.pairs import Pair, PairTokenizer
from services.core.modeling.types import EncodeItem, Tokens

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime


class PairScorer:
    """A cross-encoder, loaded when it has to be; scores lie between 0 and 1."""

    def __init__(
        self, spec: ModelSpec, slot: Slot[PairTokenizer, float], threads: TextThreads, runtime: Runtime
    ) -> None:
        self.spec = spec
        self._slot = slot
        self._threads = threads
        self._runtime = runtime

    async def score(self, query: str, documents: Sequence[str], options: ScoreOptions, call: Call) -> Scores:
        """Score ``documents``; each distinct one runs once, and the best of its windows counts."""
        async with self._slot.held(call) as tokenizer:
            return await self._score(tokenizer, query, documents, options, call)

    async def _score(
        self,
        tokenizer: PairTokenizer,
        query: str,
        documents: Sequence[str],
        options: ScoreOptions,
        call: Call,
    ) -> Scores:
        texts, places = distinct(documents)
        expected = sum(1 + (len(query) + len(text)) // CHARACTERS_PER_TOKEN for text in texts)
        with self._runtime.admitted(self._slot.lane, len(texts), expected, call.tenant) as ticket:
            asked, pairs = await self._pairs(tokenizer, query, texts, options, call)
            lengths = np.array([pair.document_length for pair in pairs])
            billed = len(asked.ids) + tokenizer.special_length + int(lengths[places].sum())
            await call.charge(billed)
            ticket.counted()
            items = [EncodeItem(window) for pair in pairs for window in pair.windows]
            job = Job(self._slot.lane, items, [len(item.token_ids) for item in items])
            scores = np.array(await self._runtime.run(job, call), np.float32)
        require_finite(scores, self.spec.id)
        windows = [len(pair.windows) for pair in pairs]
        best = np.maximum.reduceat(scores, np.cumsum([0, *windows[:-1]]))
        return Scores(values=best[places], tokens=billed)

    async def _pairs(
        self, tokenizer: PairTokenizer, query: str, texts: Sequence[str], options: ScoreOptions, call: Call
    ) -> tuple[Tokens, list[Pair]]:
        began = time.monotonic()
        (asked,) = await self._threads.map([query], lambda one: [tokenizer.query(one[0])])
        longest = options.max_document_length or self.spec.max_document_length or None

        def work(part: Sequence[str]) -> list[Pair]:
            return tokenizer.pairs(asked, part, longest)

        pairs = await self._threads.map(texts, work)
        call.timings.tokenize += time.monotonic() - began
        if not options.truncate and any(pair.truncated for pair in pairs):
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=self._limit(asked, longest))
        return asked, pairs

    def _limit(self, asked: Tokens, longest: int | None) -> int:
        """Return the limit that a text of the request passed."""
        if asked.truncated:
            return self.spec.max_query_length or self.spec.max_tokens
        return longest or self.spec.max_tokens

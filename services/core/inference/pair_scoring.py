"""Scoring documents by networks that read each of them together with the query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.core.call import Call
from services.core.content import Content, Input, Opening
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.embedding import require_finite
from services.core.inference.scoring import ScoreOptions, Scores, distinct
from services.core.inference.submission import Expected, Submission, Work, add_up, guess, named_media
from services.core.modeling.types import Columns, PairProcessor, PreparedPair, PreparedQuery


class PairScorer:
    """A model that scores pairs, loaded when it has to be; scores lie between 0 and 1."""

    def __init__(self, submission: Submission[PairProcessor, float]) -> None:
        self.spec = submission.spec
        self._submission = submission

    async def score(
        self, query: Content, documents: Sequence[Content], options: ScoreOptions, call: Call
    ) -> Scores:
        """Score ``documents``; each distinct one runs once, and the best of its windows counts."""
        different, places = distinct(documents)
        copies = [1, *np.bincount(places).tolist()]

        def expected(processor: PairProcessor) -> Expected:
            asked = 1 + guess(query, processor.expected)
            cost = sum(asked + guess(each, processor.expected) for each in different)
            media = [*named_media([query], "query"), *named_media(different, "document")]
            return Expected(len(different), cost, media, processor.fit)

        async def prepare(processor: PairProcessor, opening: Opening) -> Work[list[int]]:
            asked, pairs = await self._pairs(processor, query, different, options, opening)
            usage = add_up([asked.usage, *(pair.usage for pair in pairs)], copies)
            windows = [window for pair in pairs for window in pair.windows]
            return Work(Columns.of(windows), usage, [len(pair.windows) for pair in pairs])

        work, results = await self._submission.run(call, expected, prepare)
        scores = np.array(results, np.float32)
        require_finite(scores, self.spec.id)
        best = np.maximum.reduceat(scores, np.cumsum([0, *work.detail[:-1]]))
        return Scores(best[places], work.usage)

    async def _pairs(
        self,
        processor: PairProcessor,
        query: Content,
        documents: Sequence[Content],
        options: ScoreOptions,
        opening: Opening,
    ) -> tuple[PreparedQuery, list[PreparedPair]]:
        longest = options.max_document_length or 0
        apply = self._submission.apply

        def ask(part: Sequence[Input]) -> list[PreparedQuery]:
            return [processor.query(one) for one in part]

        found = await apply([query], ask, opening, name="query")
        (asked,) = found.results

        def join(part: Sequence[Input]) -> list[PreparedPair]:
            return processor.pairs(asked, part, longest)

        pairs = (await apply(documents, join, opening, name="document")).results
        if not options.truncate and (asked.truncated or any(pair.truncated for pair in pairs)):
            limit = processor.limit(asked, longest)
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit)
        return asked, pairs

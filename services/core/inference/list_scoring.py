"""Scoring documents by networks that read many of them together with the query, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.core.call import Call
from services.core.content import Content, Opening, Usage
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.embedding import Vectors, finish, require_finite
from services.core.inference.scoring import ScoreOptions, Scores
from services.core.inference.submission import CHARACTERS_PER_TOKEN, Expected, Submission, Work
from services.core.modeling.families.listwise import BLOCK_DOCUMENTS, ListProcessor
from services.core.modeling.families.text import only_texts
from services.core.modeling.types import Columns


class ListScorer:
    """A model that scores lists, loaded when it has to be; scores lie between -1 and 1.

    A document's score depends on what else is in its block and where it stands there, so equal documents may
    get different scores. Each block is an item of the queue: work of other calls runs between two of them.
    """

    def __init__(self, submission: Submission[ListProcessor, Vectors]) -> None:
        self.spec = submission.spec
        self._submission = submission

    async def score(
        self, query: Content, documents: Sequence[Content], options: ScoreOptions, call: Call
    ) -> Scores:
        """Score ``documents``; see ``Scorer.score``."""

        def expected(_: ListProcessor) -> Expected:
            asked, *texts = only_texts([query, *documents], self.spec)
            tokens = 1 + (2 * len(asked) + sum(map(len, texts))) // CHARACTERS_PER_TOKEN
            return Expected(1 + len(texts) // BLOCK_DOCUMENTS, tokens)

        async def prepare(processor: ListProcessor, _: Opening) -> Work[None]:
            texts = only_texts([query, *documents], self.spec)
            return await self._prepare(processor, texts[0], texts[1:], options)

        work, vectors = await self._submission.run(call, expected, prepare)
        values, found = fuse(vectors)
        require_finite(values, self.spec.id)
        return Scores(values, work.usage, finish(found) if options.return_embeddings else None)

    async def _prepare(
        self, processor: ListProcessor, query: str, documents: Sequence[str], options: ScoreOptions
    ) -> Work[None]:
        """Cut the texts and write the prompts of all blocks."""
        longest = options.max_document_length or 0
        map_texts = self._submission.threads.map
        (asked,) = await map_texts([query], lambda one: [processor.query(one[0])])
        cut = await map_texts(documents, lambda part: processor.documents(part, longest))
        if not options.truncate and (asked.truncated or any(text.truncated for text in cut)):
            limit = processor.query_limit if asked.truncated else processor.limit(longest)
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=limit)
        prompts = processor.prompts(asked, cut, longest)
        prepared = await map_texts(prompts, processor.prepare)
        return Work(Columns.of(prepared), Usage(asked.length + sum(text.length for text in cut)), None)


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

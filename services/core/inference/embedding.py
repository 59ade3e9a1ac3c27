"""Embedding texts with one loaded model, and finishing the vectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from services.core.call import Call
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.inference.jobs import Job, Lane
from services.core.inference.tokenizing import TokenizeStage
from services.core.modeling.types import EncodeItem, Encoding, Tokens

if TYPE_CHECKING:
    from services.core.inference.runtime import Runtime

Vectors = NDArray[np.float32]

_CHARACTERS_PER_TOKEN = 4
"""To guess how much a call will queue before its tokens are counted."""


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """``task`` None is the model's default; ``truncate`` cuts a text that is too long instead of failing."""

    task: str | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``vectors`` (texts, width) fp32 as the model pooled them, not normalised; ``token_counts`` per text.

    Counts include special tokens and prompts, and stop at what the model saw of a text that was cut.
    """

    vectors: Vectors
    token_counts: list[int]


class EmbeddingModel:
    """A text embedding model in memory, behind the queue it shares with others."""

    def __init__(
        self, spec: ModelSpec, stage: TokenizeStage, lane: Lane[EncodeItem, Encoding], runtime: Runtime
    ) -> None:
        self.spec = spec
        self._stage = stage
        self._lane = lane
        self._runtime = runtime

    def renamed(self, alias: ModelSpec) -> EmbeddingModel:
        """Return the same model under an alias' entry."""
        return EmbeddingModel(alias, self._stage, self._lane, self._runtime)

    async def embed(self, texts: Sequence[str], options: EmbedOptions, call: Call) -> Embeddings:
        """Embed ``texts``; the order is kept.

        Fills ``call.timings`` and awaits ``call.charge`` with the number of tokens before anything runs.
        Raises ServiceError: INPUT_TOKEN_LIMIT_EXCEEDED for a text that is too long, INPUT_INVALID for one
        that is not Unicode, SERVICE_UNAVAILABLE with ``retry_after`` when the queue is full or the engine
        stops, SERVICE_TIMEOUT at ``call.deadline``, and what ``charge`` raises. Cancelling takes the work
        that has not begun out of the queue.
        """
        if not texts:
            return Embeddings(np.empty((0, self.spec.dimensions), np.float32), [])
        with self._runtime.admitted(self._lane, len(texts), self._guess(texts)) as ticket:
            tokens = await self._tokenize(texts, options, call)
            counts = [len(each.ids) for each in tokens]
            await call.charge(sum(counts))
            adapter = self.spec.adapter(options.task)
            items = [EncodeItem(each.ids, adapter) for each in tokens]
            ticket.counted()
            results = await self._runtime.run(Job(self._lane, items, counts), call)
        return Embeddings(_stack(results), counts)

    def _guess(self, texts: Sequence[str]) -> int:
        limit = self.spec.max_tokens
        return sum(min(1 + len(text) // _CHARACTERS_PER_TOKEN, limit) for text in texts)

    async def _tokenize(self, texts: Sequence[str], options: EmbedOptions, call: Call) -> list[Tokens]:
        began = time.monotonic()
        tokens = await self._stage.encode(texts, self.spec.prompt(options.task))
        call.timings.tokenize += time.monotonic() - began
        if not options.truncate and any(each.truncated for each in tokens):
            raise ServiceError(ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED, limit=self.spec.max_tokens)
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

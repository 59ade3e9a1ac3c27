"""A query and a document as one sequence, for networks that read both together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Fit, Input, Usage
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.text import only_texts
from services.core.modeling.types import (
    EncodeItem,
    Prepared,
    PreparedPair,
    PreparedQuery,
    TokenIds,
    Tokens,
    UnfitInputError,
)


@dataclass(frozen=True, slots=True)
class PairRules:
    """What a model does with lengths, in tokens with specials.

    ``longest`` is that of one sequence, ``longest_query`` that of a query (0: no limit of its own). With
    ``overlap`` a document too long for its sequence is read in windows that share up to that many tokens;
    None cuts whichever text is longer.
    """

    longest: int
    longest_query: int = 0
    overlap: int | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A query with a document: one sequence, or one for each window of the document.

    ``document_length`` counts the tokens that are read of the document, specials of a text alone included.
    ``truncated`` says that some of the query or the document is not read.
    """

    windows: tuple[TokenIds, ...]
    document_length: int
    truncated: bool


class PairTokenizer:
    """Makes pairs; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, rules: PairRules) -> None:
        """CheckpointError if nothing stands between the texts of a pair, or a query may leave no room."""
        if rules.overlap is not None and rules.longest < 2 * rules.longest_query:
            raise CheckpointError(
                f"sequences of {rules.longest} tokens have to hold two queries of {rules.longest_query}"
            )
        self.plain = tokenizer
        self.special_length = tokenizer.special_length
        self._rules = rules
        self._before, self._between, self._after = tokenizer.pair_specials()
        self._room = rules.longest - len(self._before) - len(self._between) - len(self._after)

    def query(self, text: str) -> Tokens:
        """Tokenise a query, without specials, cut to its own limit."""
        limit = self._rules.longest_query or self._rules.longest
        (tokens,) = self.plain.encode_batch([text], truncate_to=limit)
        return tokens._replace(ids=self._bare(tokens.ids))

    def pairs(self, query: Tokens, documents: Sequence[str], longest: int | None = None) -> list[Pair]:
        """Join ``query`` with each document, cut to ``longest`` tokens with specials where that is given."""
        cuts = self._rules.overlap is None
        limit = min(longest or self._rules.longest, self._rules.longest) if cuts else longest
        if limit is not None:
            limit = max(limit, self.special_length + 1)
        tokens = self.plain.encode_batch(documents, truncate_to=limit)
        return [self._pair(query, each) for each in tokens]

    def _pair(self, query: Tokens, document: Tokens) -> Pair:
        first, second = query.ids, self._bare(document.ids)
        if self._rules.overlap is None:
            kept, rest = longest_first(len(first), len(second), self._room)
        else:
            kept, rest = len(first), len(second)
        truncated = query.truncated or document.truncated or kept < len(first) or rest < len(second)
        first, second = first[:kept], second[:rest]
        sequences = tuple(self._join(first, window) for window in self._windows(first, second))
        return Pair(sequences, rest + self.special_length, truncated)

    def _windows(self, query: TokenIds, document: TokenIds) -> list[TokenIds]:
        room = self._room - len(query)
        if self._rules.overlap is None or len(document) <= room:
            return [document]
        step = room - min(self._rules.overlap, room // 4)
        last = len(document) - room
        return [document[start : start + room] for start in (*range(0, last, step), last)]

    def _join(self, query: TokenIds, document: TokenIds) -> TokenIds:
        return np.concatenate([self._before, query, self._between, document, self._after])

    def _bare(self, ids: TokenIds) -> TokenIds:
        return ids[self.plain.prefix_length : len(ids) - self.plain.suffix_length]


class TextPairProcessor:
    """Pairs of texts to items; see ``types.PairProcessor``."""

    def __init__(self, spec: ModelSpec, tokenizer: PairTokenizer) -> None:
        self.fit: Fit | None = None
        self._spec = spec
        self._tokenizer = tokenizer

    def expected(self, kind: Modality) -> int:
        """Raise UnfitInputError: there is no other kind than text."""
        raise UnfitInputError(f"Model '{self._spec.id}' takes text only, not '{kind}'.")

    def query(self, query: Input) -> PreparedQuery:
        """Tokenise a query; it is billed with the specials of a text alone."""
        (text,) = only_texts([query], self._spec)
        tokens = self._tokenizer.query(text)
        billed = len(tokens.ids) + self._tokenizer.special_length
        return PreparedQuery(tokens, Usage(billed), tokens.truncated)

    def pairs(self, query: PreparedQuery, documents: Sequence[Input], longest: int) -> list[PreparedPair]:
        """Join the query with each document, in windows where it is too long for one sequence."""
        texts = only_texts(documents, self._spec)
        pairs = self._tokenizer.pairs(query.form, texts, longest or self._spec.max_document_length or None)
        return [_prepared(pair) for pair in pairs]

    def limit(self, query: PreparedQuery, longest: int) -> int:
        """Return the limit that a text of the request passed."""
        if query.truncated:
            return self._spec.max_query_length or self._spec.max_tokens
        return longest or self._spec.max_document_length or self._spec.max_tokens


def _prepared(pair: Pair) -> PreparedPair:
    windows = tuple(Prepared(EncodeItem(ids), Usage()) for ids in pair.windows)
    return PreparedPair(windows, Usage(pair.document_length), pair.truncated)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that have to fit into ``room`` together, the longer one being cut first."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if 2 * shorter <= room:
        return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
    half = room // 2
    return (half, room - half) if first <= second else (room - half, half)

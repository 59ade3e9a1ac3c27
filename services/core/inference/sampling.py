"""Which token comes next: from the logits of a step, by what its caller asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from services.core.modeling.types import ChatProcessor, UnfitInputError

T = TypeVar("T")

_MOST_VALUES, _DEEPEST = 2000, 100
"""Of a schema. With a thousand properties to compile it takes a third of a second, and to find what may come
first a tenth of one; both grow by the square."""

_LIKELY = 1024
"""Tokens that ``top_p`` looks at first: to put a whole vocabulary in order takes ten times as long."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, in the words of the API.

    ``temperature`` 0 takes the most likely, whatever else is asked. ``top_k`` 0 is all. The penalties are
    taken off the logits of tokens that the answer has: once, and once for each time. ``seed`` makes answers
    the same again. ``top_logprobs`` None leaves out what each token's probability was.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    top_logprobs: int | None = None


class Chosen(NamedTuple):
    """A token, its log probability, and those of the most likely ones; without asking none of these."""

    id: int
    logprob: float = 0.0
    likely: tuple[tuple[int, float], ...] = ()


class Grammars:
    """Makes what holds answers to a schema, over the vocabulary of one model."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._vocabulary = _Vocabulary(processor)
        self._tokenizer: LLTokenizer | None = None

    def matcher(self, schema: Mapping[str, Any]) -> LLMatcher:
        """Compile a JSON schema; takes milliseconds, the first one of a process longer.

        Raises UnfitInputError for a schema that cannot be held to, or that is too large for it.
        """
        _refuse_large(schema)
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(TokenizerWrapper(self._vocabulary))
        # White space that may be as long as it likes is what small models fill their answers with.
        form: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=form)
        except ValueError as error:
            raise UnfitInputError(_unfit(str(error))) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UnfitInputError(_unfit(matcher.get_error()))
        _allowed(matcher, len(self._vocabulary.tokens))
        return matcher


class _Vocabulary:
    """A processor's vocabulary, as llguidance takes one."""

    def __init__(self, processor: ChatProcessor) -> None:
        self.eos_token_id = min(processor.ends)
        self.bos_token_id = None
        # A token without bytes would be allowed everywhere and lead nowhere: it is told as a special one.
        pieces = processor.pieces
        self.special_token_ids = [id for id, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"<%d>" % id for id, piece in enumerate(pieces)]
        self._tokenize = processor.tokenize

    def __call__(self, text: str) -> list[int]:
        return self._tokenize(text)


@dataclass(slots=True, eq=False)
class Sampler:
    """Chooses the tokens of one answer. The same logits and the same ``said`` give the same token again."""

    sampling: Sampling
    ends: frozenset[int]
    matcher: LLMatcher | None = None
    _consumed: int = field(default=0, init=False)

    @property
    def plain(self) -> bool:
        """Whether the most likely token is the answer, and nothing more is asked."""
        asked = self.sampling
        return (
            asked.temperature == 0
            and not (asked.presence_penalty or asked.frequency_penalty)
            and asked.top_logprobs is None
            and self.matcher is None
        )

    def choose(self, logits: NDArray[np.float32], said: Sequence[int]) -> Chosen:
        """Choose by ``logits`` (vocabulary,) what follows ``said``, the tokens of the answer so far.

        Raises UnfitInputError for a schema that turns out to be too much.
        """
        scores = logits.astype(np.float32, copy=True)
        asked = self.sampling
        if asked.presence_penalty or asked.frequency_penalty:
            for id, times in Counter(said).items():
                scores[id] -= asked.presence_penalty + asked.frequency_penalty * times
        if self.matcher is not None:
            self._hold_to_grammar(self.matcher, scores, said)
        if asked.temperature == 0:
            id = int(scores.argmax())
        else:
            # A generator of its own for each place: what others draw meanwhile has no part in it.
            seed = np.random.SeedSequence([asked.seed & 0xFFFFFFFFFFFFFFFF, len(said)])
            draw = np.random.Generator(np.random.Philox(seed)).random()
            # By next to nothing all but the most likely become infinitely less so; as they are, all would.
            with np.errstate(over="ignore"):
                scaled = (scores.astype(np.float64) - scores.max()) / asked.temperature
            id = _drawn(scaled, asked.top_k, asked.top_p, draw)
        return Chosen(id) if asked.top_logprobs is None else _with_logprobs(id, logits, asked.top_logprobs)

    def _hold_to_grammar(self, matcher: LLMatcher, scores: NDArray[np.float32], said: Sequence[int]) -> None:
        for id in said[self._consumed :]:
            matcher.consume_token(id)
        self._consumed = len(said)
        allowed = _allowed(matcher, len(scores))
        if matcher.is_stopped() or matcher.is_accepting():
            allowed[[id for id in self.ends if id < len(scores)]] = True
        scores[~allowed] = -np.inf


def _allowed(matcher: LLMatcher, count: int) -> NDArray[np.bool_]:
    """Say of each of ``count`` ids whether it may follow; none at the end. UnfitInputError for a dead end."""
    if not matcher.is_stopped():
        mask = allocate_token_bitmask(1, count)
        fill_next_token_bitmask(matcher, mask, 0)
        if not matcher.is_stopped():
            return np.unpackbits(mask.view(np.uint8)[0], bitorder="little")[:count].astype(bool)
    if matcher.is_error() or not matcher.is_accepting():
        raise UnfitInputError(_unfit(f"no answer fits it ({matcher.stop_reason()})"))
    return np.zeros(count, bool)


def _refuse_large(schema: Mapping[str, Any]) -> None:
    """Raise UnfitInputError for a schema whose grammar would keep everybody else waiting."""
    left: list[tuple[Any, int]] = [(schema, 0)]
    for count, (value, depth) in enumerate(_pending(left)):
        if count > _MOST_VALUES or depth > _DEEPEST:
            reason = f"it has more than {_MOST_VALUES:,} values, or lies deeper than {_DEEPEST} of them"
            raise UnfitInputError(_unfit(reason))
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left.extend((each, depth + 1) for each in cast("Iterable[Any]", inner))


def _pending(stack: list[T]) -> Iterator[T]:
    while stack:
        yield stack.pop()


def _drawn(scores: NDArray[np.float64], top_k: int, top_p: float, draw: float) -> int:
    """Return the id at ``draw``, from 0 to 1, of the distribution that ``scores`` and the bounds make."""
    if not top_k and top_p >= 1:
        weights = np.exp(scores - scores.max())
        return _at(weights, draw)
    count = min(top_k or len(scores), len(scores))
    weights = np.exp(scores - scores.max())
    whole = weights.sum()
    ids = _most_likely(weights, min(count, _LIKELY))
    if count > _LIKELY and weights[ids].sum() < top_p * whole:
        ids = _most_likely(weights, count)
    if top_p < 1:
        # Of those that top_k leaves, as few as make up top_p.
        share = weights[ids] / (whole if not top_k else weights[_most_likely(weights, count)].sum())
        ids = ids[: int(np.searchsorted(np.cumsum(share), top_p)) + 1]
    return int(ids[_at(weights[ids], draw)])


def _at(weights: NDArray[np.float64], draw: float) -> int:
    sums = np.cumsum(weights)
    return int(min(np.searchsorted(sums, draw * sums[-1], side="right"), np.flatnonzero(weights)[-1]))


def _most_likely(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Return the ids of the ``count`` largest, the largest first, equal ones by id."""
    if count < len(weights):
        bound = np.partition(weights, len(weights) - count)[len(weights) - count]
        ids = np.flatnonzero(weights >= bound)
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")][:count]


def _with_logprobs(id: int, logits: NDArray[np.float32], count: int) -> Chosen:
    scores = logits.astype(np.float64)
    largest = scores.max()
    logprobs = scores - largest - np.log(np.exp(scores - largest).sum())
    likely = _most_likely(logprobs, count) if count else ()
    return Chosen(id, float(logprobs[id]), tuple((int(each), float(logprobs[each])) for each in likely))


def _unfit(reason: str) -> str:
    return f"Answers cannot be held to this schema: {reason.strip().splitlines()[0][:200]}."

"""What goes into a network and what comes out; the doors of this room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import add
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import InputType, Modality
from services.core.content import Fit, Image, Input, Usage
from services.core.modeling.layers.causal import Chunk
from services.core.modeling.layers.packed import PackedBatch

R_co = TypeVar("R_co", covariant=True)

TokenIds: TypeAlias = NDArray[np.int32]

TOGETHER_TOKENS = 1024
"""Tokens of a task in the mean, up to which a batch of several tasks is one pass where a network rests on one
task at a time. A small pass and a change of the weights take their time for few tokens as for many, that of
narrow products grows with them. Computed from what an H100 reads and writes, not measured."""


class Tokens(NamedTuple):
    """One tokenised text: ``ids`` with specials, cut to the asked length, and whether it was cut.

    ``length`` counts the tokens before the cut, specials included. For a text many times longer than the
    cut only its head is tokenised and ``length`` is a lower bound.
    """

    ids: TokenIds
    length: int
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """A picture (or sound, or film) as the tower of its ``kind`` reads it, and its place in the sequence.

    The states that the tower makes of ``data`` (a tensor on the CPU, in a form of the family's own) stand for
    the tokens ``[offset, offset + length)``. ``length`` is 0 where the tower's result is that of the item,
    as in CLIP. ``grid`` are the tower's patches in frames, rows and columns, where their number varies.
    ``digest`` tells it from every other, where results for it are kept.
    """

    kind: Modality
    data: torch.Tensor
    offset: int = 0
    length: int = 0
    grid: tuple[int, int, int] | None = None
    digest: bytes = b""


class EncodeItem(NamedTuple):
    """One input of a forward pass.

    ``token_ids`` (tokens,) int32 with specials; without any where features are all there is. ``adapter``
    names a task adapter of the checkpoint, None is the base network. ``spans`` asks for one vector per
    half-open token range instead of one per item. Only the first ``attended`` tokens are attended to, by all
    of them; None is all. ``features`` stand in rising order of their offsets. ``positions`` (axes, tokens)
    int32 are those of the tokens, None where they are 0, 1, 2 and so on. ``multivector`` asks for a vector of
    each token, of a network that gives either.
    """

    token_ids: TokenIds
    adapter: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    attended: int | None = None
    features: tuple[Feature, ...] = ()
    positions: NDArray[np.int32] | None = None
    multivector: bool = False


class Prepared(NamedTuple):
    """One item for the queue, and what is to be known of it there: all that comes before the network.

    ``truncated`` says that something of the input was cut off. ``results`` is how many rows the item gives:
    its spans, else 1. ``patches`` are those that towers read.
    """

    item: EncodeItem
    usage: Usage
    truncated: bool = False
    results: int = 1
    patches: int = 0


class Columns(NamedTuple):
    """What a call queues: the fields of each ``Prepared``, side by side.

    A call of many texts is a matter of microseconds a text, and so is a look at each in Python.
    """

    items: Sequence[EncodeItem]
    usages: Sequence[Usage]
    truncated: Sequence[bool]
    results: Sequence[int]
    patches: Sequence[int]

    @classmethod
    def of(cls, prepared: Sequence[Prepared]) -> Columns:
        """Return those of ``prepared``, of which there is at least one."""
        return cls(*zip(*prepared, strict=True))

    @property
    def costs(self) -> list[int]:
        """What the queue, its bound and the fairness between callers count of each item; above 0."""
        tokens = [len(item.token_ids) for item in self.items]
        return list(map(add, tokens, self.patches)) if any(self.patches) else tokens


class UnfitInputError(ValueError):
    """An input that a model cannot take, whatever its form; the text says why, in words for the caller."""


class TooLongError(UnfitInputError):
    """An input with media that does not fit the context; it is not cut, since that would cut a picture."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens = tokens
        self.limit = limit
        super().__init__(f"It has {tokens:,} tokens, {limit:,} are allowed.")


class PrepareOptions(NamedTuple):
    """How inputs become items.

    ``task`` None is the model's default: its prompt stands before each text, its adapter runs. ``role`` is
    the side of a search. ``limit`` is the longest sequence in tokens, 0 the model's own. ``multivector`` is
    as of ``EncodeItem``.
    """

    task: str | None = None
    role: InputType = InputType.DOCUMENT
    limit: int = 0
    multivector: bool = False


class Processor(Protocol):
    """From inputs to the items of a network that embeds; one per family, beside the network.

    Pure: no network, no service, no state that changes. Called in several threads at once.
    """

    @property
    def fit(self) -> Fit | None:
        """The form in which it wants pictures decoded, None for pictures as they are."""
        ...

    def limit(self, options: PrepareOptions) -> int:
        """Return the longest sequence that ``prepare`` makes, in tokens; it holds one of a text at least."""
        ...

    def expected(self, kind: Modality) -> int:
        """Return about how much an input of a kind other than text will cost, before it has been fetched."""
        ...

    def prepare(self, inputs: Sequence[Input], options: PrepareOptions) -> list[Prepared]:
        """Make one item of each input, in order. A text that is too long is cut and marked as truncated.

        Raises UnfitInputError for an input that can be neither taken nor cut.
        """
        ...

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them."""
        ...


class PreparedQuery(NamedTuple):
    """A query before its documents: ``form`` is the family's own, for ``PairProcessor.pairs``."""

    form: Any
    usage: Usage
    truncated: bool = False


class PreparedPair(NamedTuple):
    """A query with one document: an item, or one for each window of a document that is read in windows.

    ``usage`` is that of the document, over all windows.
    """

    windows: tuple[Prepared, ...]
    usage: Usage
    truncated: bool = False


class PairProcessor(Protocol):
    """From a query and documents to the items of a network that scores pairs; pure, as ``Processor`` is.

    ``longest`` is that of a document in tokens, 0 the model's own.
    """

    @property
    def fit(self) -> Fit | None:
        """As of ``Processor``."""
        ...

    def query(self, query: Input) -> PreparedQuery:
        """Prepare the query, cut to its limit. Raises UnfitInputError, as does ``pairs``."""
        ...

    def pairs(self, query: PreparedQuery, documents: Sequence[Input], longest: int) -> list[PreparedPair]:
        """Join the query with each document, in order, cutting what is too long."""
        ...

    def expected(self, kind: Modality) -> int:
        """As of ``Processor``."""
        ...

    def limit(self, query: PreparedQuery, longest: int) -> int:
        """Return the limit in tokens that was passed where something is truncated: the query's if that is."""
        ...


class Message(NamedTuple):
    """One turn of a conversation: who speaks (``system``, ``user``, ``assistant``), and what."""

    role: str
    parts: tuple[str | Image, ...]


class PreparedChat(NamedTuple):
    """A conversation as a network that answers reads it; ``features`` stand in rising order of offsets."""

    token_ids: TokenIds
    features: tuple[Feature, ...]
    usage: Usage


class ChatProcessor(Protocol):
    """From conversations to the tokens of a network that answers, and back; pure, as ``Processor``."""

    @property
    def fit(self) -> Fit | None:
        """As of ``Processor``."""
        ...

    @property
    def pieces(self) -> Sequence[bytes]:
        """The UTF-8 bytes that each id of an answer writes; those of neighbours may share a character.

        Empty for ids that are marks and no text.
        """
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    def expected(self, kind: Modality) -> int:
        """As of ``Processor``."""
        ...

    def prepare(self, messages: Sequence[Message]) -> PreparedChat:
        """Write a conversation as the checkpoint's template has it. Raises UnfitInputError."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a plain text, without specials."""
        ...


class Door(StrEnum):
    """What a family does for the engine; declared in ``families/table.py``, asked of nobody else."""

    EMBEDS = "embeds"
    """Each item becomes a vector or several (``Encoding``). The processor is a ``Processor``."""
    SCORES_PAIRS = "scores pairs"
    """Each item, a query with a document, becomes a number from 0 to 1, by a ``PairProcessor``."""
    SCORES_LISTS = "scores lists"
    """Each item, a query with many documents, becomes the vectors of all, by a ``ListProcessor``."""
    GENERATES = "generates"
    """A conversation is answered token by token (``Generator``), by a ``ChatProcessor``."""


class Backend(Protocol[R_co]):
    """A loaded model, as the engine sees it, whatever its door.

    Calls may come from several threads; weights are shared and never written.
    """

    @property
    def processor(self) -> Any:
        """What makes items of inputs; its type is that of the family's door."""
        ...

    @property
    def width(self) -> int:
        """Length of one vector of the results, 0 where they are no vectors."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Tokens of a pass from which on a larger one makes no more of a device, as the warm-up found."""
        ...

    def forward(self, batch: Sequence[EncodeItem]) -> Sequence[R_co]:
        """Run the network; one result per item, in the order of ``batch``.

        Raises ``torch.OutOfMemoryError`` when the device has no room for the batch, ValueError for an item
        that the network cannot take.
        """
        ...

    def warm_up(self) -> None:
        """Run what the first real call would otherwise pay for."""
        ...


class Generator(Protocol):
    """A loaded model that answers, as the engine sees it. One ``step`` or ``look`` at a time."""

    @property
    def processor(self) -> ChatProcessor:
        """From conversations to tokens and back."""
        ...

    @property
    def width(self) -> int:
        """As of ``Backend``: there are no vectors, so 0."""
        ...

    @property
    def batch_tokens(self) -> int:
        """As of ``Backend``."""
        ...

    @property
    def block_bytes(self) -> int:
        """Memory of ``causal.BLOCK`` tokens of keys and values."""
        ...

    def open_cache(self, blocks: int) -> None:
        """Take memory for the keys and values of ``blocks`` blocks."""
        ...

    def looks(self, feature: Feature) -> int:
        """Return how many calls of ``look`` a feature takes: their length is what others wait for."""
        ...

    def look(self, feature: Feature, part: int) -> torch.Tensor:
        """Run the tower on one part of a feature."""
        ...

    def seen(self, feature: Feature, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Lay the results for all parts out as the states of the feature's tokens, (length, width)."""
        ...

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See ``CausalNetwork.step``."""
        ...

    def warm_up(self) -> None:
        """As of ``Backend``."""
        ...


class SparseVector(NamedTuple):
    """A vocabulary-sized vector: ``indices`` ascending int32, ``values`` fp32 above zero."""

    indices: NDArray[np.int32]
    values: NDArray[np.float32]


Encoding: TypeAlias = NDArray[np.float32] | SparseVector
"""Dense (width,), one row per span (spans, width), multi-vector (tokens, width), or sparse."""


class TextTokenizer(Protocol):
    """Text to token ids; safe to call from several threads."""

    @property
    def special_length(self) -> int:
        """Number of special tokens around a text; a cut leaves at least one more."""
        ...

    @property
    def prefix_length(self) -> int:
        """How many of the special tokens stand before the text."""
        ...

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them."""
        ...

    def encode_batch(
        self, texts: Sequence[str], prompt: str = "", truncate_to: int | None = None
    ) -> list[Tokens]:
        """Tokenise ``prompt + text`` for each text, specials included, cut to ``truncate_to`` tokens."""
        ...


class Backbone(Protocol):
    """A network from tokens to hidden states."""

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states, (tokens, width), in the batch's packed order.

        The next pass of the calling thread may overwrite them.
        """
        ...


class Head(Protocol):
    """What turns hidden states into the result of each item, first on the device, then on the host.

    ``items`` are in packed order, as ``hidden`` is.
    """

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return all numbers of the results, fp32 on the device, without waiting for it.

        In a shape of the head's own, for ``results``.
        """
        ...

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return one result per item, made of those numbers."""
        ...


class TextEncoder(Backend[Encoding], Protocol):
    """A loaded model that reads texts and embeds them; results are fp32, pooled, not normalised."""

    @property
    def processor(self) -> Processor:
        """From texts to items."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's own tokenizer."""
        ...

    @property
    def query_tokenizer(self) -> TextTokenizer:
        """The form of a query, where the model gives queries another form than documents."""
        ...

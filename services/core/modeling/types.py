"""What goes into a network and what comes out; the doors of this room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.modeling.layers.packed import PackedBatch

TokenIds: TypeAlias = NDArray[np.int32]


class Tokens(NamedTuple):
    """One tokenised text: ``ids`` with specials, cut to the asked length, and whether it was cut.

    ``length`` counts the tokens before the cut, specials included. For a text many times longer than the
    cut only its head is tokenised and ``length`` is a lower bound, still above the cut.
    """

    ids: TokenIds
    length: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class EncodeItem:
    """One input of a forward pass.

    ``token_ids`` (tokens,) int32 with specials. ``adapter`` names a task adapter of the checkpoint, None is
    the base network. ``spans`` asks for one vector per half-open token range instead of one per item. Only
    the first ``attended`` tokens are attended to, by all of them; None is all.
    """

    token_ids: TokenIds
    adapter: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    attended: int | None = None


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
        """Return the last hidden states, (tokens, width), in the batch's packed order."""
        ...


class Head(Protocol):
    """What turns hidden states into the result of each item."""

    def __call__(
        self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return one result per item of ``items``, which are in packed order as ``hidden`` is."""
        ...


class TextEncoder(Protocol):
    """A loaded model. Calls may come from several threads; weights are shared and never written."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's own tokenizer."""
        ...

    @property
    def query_tokenizer(self) -> TextTokenizer:
        """The form of a query, where the model gives queries another form than documents."""
        ...

    @property
    def width(self) -> int:
        """Length of one vector of the result."""
        ...

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        """Run the network; results in the order of ``batch``, fp32, pooled, not normalised.

        Raises ``torch.OutOfMemoryError`` when the device has no room for the batch, ValueError for an
        item that the network cannot take (unknown adapter, too long, empty).
        """
        ...

    def warm_up(self) -> None:
        """Run what the first real call would otherwise pay for."""
        ...

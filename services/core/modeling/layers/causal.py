"""A decoder that answers: its weights, and one step of it over keys and values that are kept in blocks.

Each sequence has a table of the blocks that hold its keys and values, so that sequences of any length share
one memory, come and go between steps, and share the blocks of a beginning that they have in common. A step
takes chunks of new tokens, one chunk to a sequence: the next token of an answer, or a part of a prompt.
Sources: Kwon et al., arXiv 2309.06180 (blocks); Yu et al., OSDI 2022 (batches that change between steps).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from services.core.modeling.layers.linear import Linear, linear
from services.core.modeling.layers.rotary import Rotation

BLOCK = 64
"""Tokens of a block: whole panels of every instruction set, and small enough to share short beginnings."""


class Dense(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CausalLayer:
    """One block: RMS norms before attention and before ``down(silu(gate x) * (up x))``.

    ``joined`` holds query, key and value behind one another. Norms of heads are (head_dim,), or None.
    """

    attention_norm: torch.Tensor
    joined: Dense
    attended: Dense
    inner_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CausalForm:
    """The numbers that fix the network; ``vocabulary`` is what it may answer with."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int
    epsilon: float
    rotary_base: float


@dataclass(frozen=True, slots=True)
class CausalWeights:
    """A whole network on the host, in the dtype of the checkpoint.

    ``words`` (ids, width) may have more rows than ``head`` (vocabulary, width). ``layers`` may be a
    generator, read once, so that only one block is held twice.
    """

    form: CausalForm
    words: torch.Tensor
    layers: Iterable[CausalLayer]
    norm: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """New tokens of one sequence: ``ids`` (tokens,) int32 at the positions from ``start`` on.

    ``blocks`` int32 is the sequence's table, long enough for all of them. ``states`` are what towers made,
    each (tokens, width) from an offset in the chunk on, added to the embeddings there. Only of the last
    token of a chunk that ``asks`` are there logits.
    """

    ids: NDArray[np.int32]
    start: int
    blocks: NDArray[np.int32]
    asks: bool = True
    states: tuple[tuple[int, torch.Tensor], ...] = field(default=())

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.ids)


class CausalNetwork(Protocol):
    """The network with its memory of keys and values. One step at a time."""

    form: CausalForm

    @property
    def block_bytes(self) -> int:
        """Memory that a block takes, over all layers."""
        ...

    def open_cache(self, blocks: int) -> None:
        """Take the memory of ``blocks`` blocks, which a step may then name from 0 on."""
        ...

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run the new tokens; logits of the chunks that ask, in their order, (asking, vocabulary) fp32.

        Nothing of it depends on which chunks share a step where the compiled kernels run; elsewhere the
        library's products may round differently by their number.
        """
        ...


def embed(words: torch.Tensor, chunks: Sequence[Chunk], dtype: torch.dtype) -> torch.Tensor:
    """Return the embeddings of all tokens of ``chunks``, one chunk behind the other, (tokens, width)."""
    ids = torch.from_numpy(np.concatenate([chunk.ids for chunk in chunks])).long()
    x = functional.embedding(ids.to(words.device), words).to(dtype)
    at = 0
    for chunk in chunks:
        for offset, states in chunk.states:
            x[at + offset : at + offset + len(states)] += states.to(x.device, x.dtype)
        at += len(chunk.ids)
    return x


def refuse_foreign(chunks: Sequence[Chunk], words: int, positions: int, blocks: int) -> None:
    """Raise ValueError for an id, a position or a block that is not there: none may index a table."""
    for chunk in chunks:
        if not len(chunk.ids) or chunk.ids.min() < 0 or chunk.ids.max() >= words:
            raise ValueError(f"a token id lies outside the {words} that the network knows")
        needed = -(-chunk.end // BLOCK)
        if chunk.start < 0 or chunk.end > positions or needed > len(chunk.blocks):
            raise ValueError(f"positions up to {chunk.end} are not those of {len(chunk.blocks)} blocks")
        used = chunk.blocks[:needed]
        if used.min() < 0 or used.max() >= blocks:
            raise ValueError(f"a block lies outside the cache of {blocks}")


class TorchCausal:
    """The network in torch operations, for every device and dtype."""

    def __init__(self, weights: CausalWeights, device: torch.device, dtype: torch.dtype) -> None:
        """Bring ``weights`` to ``device`` as ``dtype``."""
        self.form = weights.form
        self._device, self._dtype = device, dtype
        self._words = weights.words.to(device, dtype)
        self._layers = [_TorchLayer.of(layer, weights.form, device, dtype) for layer in weights.layers]
        self._norm = weights.norm.to(device, dtype)
        self._head = linear(weights.head.to(dtype), None, device)
        self._keys = self._values = torch.empty(0)

    @property
    def block_bytes(self) -> int:
        """See ``CausalNetwork``."""
        form = self.form
        return 2 * form.layers * BLOCK * form.key_heads * form.head_dim * self._dtype.itemsize

    def open_cache(self, blocks: int) -> None:
        """See ``CausalNetwork``."""
        form = self.form
        shape = (form.layers, blocks * BLOCK, form.key_heads, form.head_dim)
        self._keys = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._values = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See ``CausalNetwork``."""
        refuse_foreign(chunks, len(self._words), self.form.positions, self._keys.shape[1] // BLOCK)
        with torch.inference_mode():
            return self._step(chunks)

    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        places = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        tables = np.concatenate([_slots(chunk, chunk.start, chunk.end) for chunk in chunks])
        positions = torch.from_numpy(places).to(self._device)
        slots = torch.from_numpy(tables).to(self._device)
        rotation = Rotation(positions, self.form.head_dim, self.form.rotary_base)
        groups = _groups(chunks, self._device)
        x = embed(self._words, chunks, self._dtype)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            x = layer(x, rotation, slots, groups, keys, values)
        ends = list(accumulate(len(chunk.ids) for chunk in chunks))
        asking = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.asks]
        if not asking:
            return torch.empty(0, self.form.vocabulary)
        rows = x[torch.tensor(asking, device=self._device)]
        return self._head(functional.rms_norm(rows, self._norm.shape, self._norm, self.form.epsilon)).float()


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of the same number of tokens, as rows ``[first, first + count * length)`` of a step.

    ``slots`` (count, longest) are the places of the keys that any of them sees; ``seen`` (count, 1, length,
    longest) says which token sees which.
    """

    rows: torch.Tensor
    count: int
    slots: torch.Tensor
    seen: torch.Tensor


def _slots(chunk: Chunk, start: int, end: int) -> NDArray[np.int64]:
    """Return the places in the cache of the positions ``[start, end)``."""
    positions = np.arange(start, end)
    return chunk.blocks[positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK


def _groups(chunks: Sequence[Chunk], device: torch.device) -> list[_Group]:
    starts = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
    by_length: dict[int, list[int]] = {}
    for i, chunk in enumerate(chunks):
        # Long chunks one by one: what they see differs, and padding it would be most of the work.
        by_length.setdefault(len(chunk.ids) if len(chunk.ids) <= 4 else -i, []).append(i)
    groups: list[_Group] = []
    for members in by_length.values():
        longest = max(chunks[i].end for i in members)
        length = len(chunks[members[0]].ids)
        slots = np.zeros((len(members), longest), np.int64)
        seen = np.zeros((len(members), 1, length, longest), bool)
        for row, i in enumerate(members):
            chunk = chunks[i]
            slots[row, : chunk.end] = _slots(chunk, 0, chunk.end)
            seen[row, 0] = np.arange(longest) <= np.arange(chunk.start, chunk.end)[:, None]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        groups.append(
            _Group(
                torch.from_numpy(rows).to(device),
                len(members),
                torch.from_numpy(slots).to(device),
                torch.from_numpy(seen).to(device),
            )
        )
    return groups


@dataclass(frozen=True, slots=True)
class _TorchLayer:
    form: CausalForm
    attention_norm: torch.Tensor
    joined: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attended: Linear
    inner_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear

    @classmethod
    def of(
        cls, layer: CausalLayer, form: CausalForm, device: torch.device, dtype: torch.dtype
    ) -> _TorchLayer:
        def dense(each: Dense) -> Linear:
            return linear(each.weight.to(dtype), None if each.bias is None else each.bias.to(dtype), device)

        def gain(each: torch.Tensor | None) -> torch.Tensor | None:
            return None if each is None else each.to(device, dtype)

        return cls(
            form=form,
            attention_norm=layer.attention_norm.to(device, dtype),
            joined=dense(layer.joined),
            query_norm=gain(layer.query_norm),
            key_norm=gain(layer.key_norm),
            attended=dense(layer.attended),
            inner_norm=layer.inner_norm.to(device, dtype),
            gate=dense(Dense(layer.gate)),
            up=dense(Dense(layer.up)),
            down=dense(Dense(layer.down)),
        )

    def __call__(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        slots: torch.Tensor,
        groups: Sequence[_Group],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        heads, key_heads = self.form.heads, self.form.key_heads
        joined = self.joined(self._normed(x, self.attention_norm)).view(len(x), -1, self.form.head_dim)
        query, key, value = joined.split((heads, key_heads, key_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query.copy_(self._normed(query, self.query_norm))
            key.copy_(self._normed(key, self.key_norm))
        rotation.rope(joined[:, : heads + key_heads])
        keys[slots], values[slots] = key, value
        attended = torch.empty(len(x), heads * self.form.head_dim, dtype=x.dtype, device=x.device)
        for group in groups:
            q = query[group.rows].unflatten(0, (group.count, -1)).transpose(1, 2)
            k, v = keys[group.slots].transpose(1, 2), values[group.slots].transpose(1, 2)
            out = scaled_dot_product_attention(q, k, v, attn_mask=group.seen, enable_gqa=True)
            attended[group.rows] = out.transpose(1, 2).reshape(len(group.rows), -1)
        x = self.attended.add(attended, x)
        y = self._normed(x, self.inner_norm)
        return self.down.add(self.up.mul(y, self.gate.silu(y)), x)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.form.epsilon)

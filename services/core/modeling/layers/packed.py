"""A ragged batch without padding: the tokens of all items behind one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.cuda.ops import Rows

if TYPE_CHECKING:  # that module reads this one
    from services.core.modeling.layers.rotary import Rotation


class Packable(Protocol):
    """What packing needs to know of an item."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """(tokens,) with specials."""
        ...

    @property
    def adapter(self) -> str | None:
        """Task adapter, None for the base network."""
        ...

    @property
    def attended(self) -> int | None:
        """How many of the first tokens may be attended to, None for all."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` neighbouring items of the same ``length``; the first begins at token ``start``."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """Token behind the last item."""
        return self.start + self.count * self.length


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Neighbouring tokens ``[start, end)`` that share a task adapter.

    With ``tags`` (end - start,) int32 on the device each has its own: its place among those of the network,
    -1 for none.
    """

    start: int
    end: int
    adapter: str | None
    tags: torch.Tensor | None = None

    def clipped(self, rows: slice) -> AdapterRun:
        """Return what of it lies in ``rows``, some of which do, counted from there."""
        start, end = max(self.start, rows.start), min(self.end, rows.stop)
        tags = None if self.tags is None else self.tags[start - self.start : end - self.start]
        return AdapterRun(start - rows.start, end - rows.start, self.adapter, tags)


@dataclass(frozen=True, slots=True, eq=False)
class Inserted:
    """States that stand for tokens instead of the embeddings of their ids, as towers make them.

    ``states`` (rows, width) are those of the tokens ``places`` (rows,) int64, in rising order, both on the
    device.
    """

    places: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Items sorted by adapter, then length, so that equal ones are neighbours and need no padding.

    ``token_ids`` (tokens,) and ``cu_lengths`` (items + 1,) are int32 on the device. ``order[i]`` is the
    place that packed item i had in the input. ``attended`` says for each item how many of its first tokens
    may be attended to; None where every item may see all of itself. ``wanted`` (rows,) int32 are the tokens,
    in rising order, whose last states are asked for; None is all. A network may leave the others wrong.

    ``inserted`` are states of media among the tokens, for a network that takes them, ``rotation`` the turn of
    each token where that does not follow from its place in the item.

    Where kernels of our own run the batch, ``rows`` is what they know of it, ``wanted_rows`` is ``wanted`` on
    the device, maybe with repetitions behind it, and all items have one adapter, on which the network rests,
    unless ``tags`` (tokens,) int32 says that of each token as ``AdapterRun.tags`` does.
    """

    token_ids: torch.Tensor
    cu_lengths: torch.Tensor
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    adapter_runs: tuple[AdapterRun, ...]
    attended: tuple[int, ...] | None = None
    wanted: NDArray[np.int32] | None = None
    tags: NDArray[np.int32] | None = None
    rows: Rows | None = None
    wanted_rows: torch.Tensor | None = None
    inserted: Inserted | None = None
    rotation: Rotation | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all items together."""
        return self.token_ids.shape[0]

    @cached_property
    def max_length(self) -> int:
        """Length of the longest item."""
        return max(self.lengths)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbouring items of one length, for who has to compute them apart."""
        return _groups(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.token_ids.device

    @property
    def wanted_runs(self) -> tuple[AdapterRun, ...]:
        """``adapter_runs`` of the wanted tokens, counted by them."""
        if self.wanted is None:
            return self.adapter_runs
        if self.rows is not None:
            return tuple(self._wanted_run(run) for run in self.adapter_runs)
        bounds = np.searchsorted(self.wanted, [(run.start, run.end) for run in self.adapter_runs]).tolist()
        return tuple(
            AdapterRun(start, end, run.adapter)
            for (start, end), run in zip(bounds, self.adapter_runs, strict=True)
            if start < end
        )

    def _wanted_run(self, run: AdapterRun) -> AdapterRun:
        if run.tags is None:
            return run
        assert self.wanted_rows is not None
        return AdapterRun(0, self.wanted_rows.shape[0], None, run.tags[self.wanted_rows])

    def positions(self) -> torch.Tensor:
        """Place of each token in its item, from 0; (tokens,) int32 on the device."""
        if self.rows is not None:
            return self.rows.positions
        places = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        starts = torch.repeat_interleave(
            self.cu_lengths[:-1], self.cu_lengths.diff(), output_size=self.tokens
        )
        return places - starts


@dataclass(frozen=True, slots=True)
class Limits:
    """What a network takes: ids below ``vocabulary``, items up to ``positions`` tokens, known adapters."""

    vocabulary: int
    positions: int
    adapters: frozenset[str] = frozenset()

    def check(self, ids: NDArray[np.int32], lengths: Sequence[int], adapters: Iterable[str | None]) -> None:
        """Check a whole batch at once, for a bad id must never index a table. ValueError names the first."""
        if min(lengths) == 0:
            raise ValueError("an item has no tokens")
        if max(lengths) > self.positions:
            raise ValueError(f"an item of {max(lengths)} tokens, the network takes {self.positions}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValueError(f"a token id lies outside the vocabulary of {self.vocabulary}")
        for adapter in adapters:
            if adapter is not None and adapter not in self.adapters:
                known = ", ".join(sorted(self.adapters)) or "none"
                raise ValueError(f"no adapter '{adapter}'; there are: {known}")


def pack(items: Sequence[Packable], device: torch.device, limits: Limits) -> PackedBatch:
    """Lay ``items`` out behind one another on ``device``. ValueError for what ``limits`` does not allow."""
    batch = lay_out(items, limits)
    return batch if device.type == "cpu" and not cuda.serves_device(device) else place(batch, device)


def lay_out(items: Sequence[Packable], limits: Limits) -> PackedBatch:
    """Lay ``items`` out behind one another on the host; raises as ``pack``."""
    if not items:
        raise ValueError("a batch needs at least one item")
    texts = [item.token_ids for item in items]
    adapters = [item.adapter or "" for item in items]
    attended = [item.attended for item in items]
    sizes = list(map(len, texts))
    known = set(adapters)
    if len(known) == 1:
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
    else:
        order = sorted(range(len(sizes)), key=lambda i: (adapters[i], sizes[i]))
    lengths = tuple([sizes[i] for i in order])
    bounds = np.zeros(len(items) + 1, np.int32)
    np.cumsum(lengths, out=bounds[1:])
    ids = np.concatenate([texts[i] for i in order]).astype(np.int32, copy=False)
    limits.check(ids, lengths, [adapter or None for adapter in known])
    if len(known) == 1:
        runs = (AdapterRun(0, len(ids), adapters[0] or None),)
    else:
        runs = _adapter_runs([adapters[i] for i in order], bounds[1:])
    whole = attended.count(None) == len(attended)
    return PackedBatch(
        token_ids=torch.from_numpy(ids),
        cu_lengths=torch.from_numpy(bounds),
        lengths=lengths,
        order=tuple(order),
        adapter_runs=runs,
        attended=None if whole else _attended(lengths, [attended[i] for i in order]),
    )


def _attended(lengths: Sequence[int], attended: Sequence[int | None]) -> tuple[int, ...]:
    seen = tuple(size if count is None else count for size, count in zip(lengths, attended, strict=True))
    for size, count in zip(lengths, seen, strict=True):
        if not 0 < count <= size:
            raise ValueError(f"an item of {size} tokens cannot attend to {count} of them")
    return seen


def segments(lengths: NDArray[np.int64], device: torch.device) -> PackedBatch:
    """Return the bounds of items of these ``lengths``, in their order, on ``device``: of what has no ids."""
    sizes = tuple(lengths.tolist())
    bounds = np.cumsum([0, *sizes], dtype=np.int32)
    total = int(bounds[-1])
    batch = PackedBatch(
        token_ids=torch.zeros(total, dtype=torch.int32),
        cu_lengths=torch.from_numpy(bounds),
        lengths=sizes,
        order=tuple(range(len(sizes))),
        adapter_runs=(AdapterRun(0, total, None),),
    )
    return batch if device.type == "cpu" and not cuda.serves_device(device) else place(batch, device)


class Frame:
    """Where the numbers of a batch lie in one buffer, so that they travel to the device in one copy.

    There is room for ``tokens`` tokens, with ``tagged`` for a task of each and, unless that is 0, for
    ``wanted`` rows; the bounds of the items, of which there may be any number, come last. What a batch leaves
    of the room is rows that see nothing and have no task.
    """

    def __init__(self, tokens: int, wanted: int, *, tagged: bool = False) -> None:
        # Kernels are compiled for addresses that are multiples of 16 bytes.
        self.tokens = tokens
        self._stride = -(-tokens // 16) * 16
        self.wanted = wanted
        self.tagged = tagged
        self._wanted_at = (5 if tagged else 4) * self._stride
        self._bounds = self._wanted_at + -(-wanted // 16) * 16

    def size(self, items: int) -> int:
        """Numbers of a batch of so many items."""
        return self._bounds + items + 1

    def fill(self, batch: PackedBatch, out: NDArray[np.int32]) -> None:
        """Write ``batch``, as ``lay_out`` makes it, to ``out`` (size,)."""
        count, stride = batch.tokens, self._stride
        bounds = batch.cu_lengths.numpy()
        lengths = np.diff(bounds)
        starts = np.repeat(bounds[:-1], lengths)
        here = np.arange(self.tokens, dtype=np.int32)
        ids, positions, first, last = (out[i * stride : i * stride + self.tokens] for i in range(4))
        ids[:count] = batch.token_ids.numpy()
        ids[count:] = 0
        np.subtract(here[:count], starts, out=positions[:count])
        positions[count:] = 0
        first[:count] = starts
        shown = bounds[1:] if batch.attended is None else bounds[:-1] + np.array(batch.attended, np.int32)
        last[:count] = np.repeat(shown, lengths)
        first[count:] = last[count:] = here[count:]
        if self.tagged:
            assert batch.tags is not None
            tags = out[4 * stride : 4 * stride + self.tokens]
            tags[:count] = batch.tags
            tags[count:] = -1
        if self.wanted:
            assert batch.wanted is not None
            rows = out[self._wanted_at : self._wanted_at + self.wanted]
            rows[: len(batch.wanted)] = batch.wanted
            rows[len(batch.wanted) :] = self.tokens - 1
        out[self._bounds : self._bounds + len(bounds)] = bounds

    def view(self, batch: PackedBatch, numbers: torch.Tensor, tokens: int) -> PackedBatch:
        """Return ``batch`` over the ``numbers`` on the device, of its first ``tokens`` tokens."""
        ids, positions, first, last = (
            numbers[i * self._stride : i * self._stride + tokens] for i in range(4)
        )
        tags = numbers[4 * self._stride : 4 * self._stride + tokens] if self.tagged else None
        return replace(
            batch,
            token_ids=ids,
            cu_lengths=numbers[self._bounds : self.size(len(batch.lengths))],
            adapter_runs=(AdapterRun(0, tokens, None, tags),),
            attended=None,
            rows=Rows(positions, first, last),
            wanted_rows=numbers[self._wanted_at :][: self.wanted] if self.wanted else None,
        )


def place(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Bring ``batch``, as ``lay_out`` makes it, to a device that computes."""
    if batch.rotation is not None:
        batch = replace(batch, rotation=batch.rotation.to(device))
    if not cuda.serves_device(device):
        ids, bounds = (pinned(t).to(device, non_blocking=True) for t in (batch.token_ids, batch.cu_lengths))
        wanted = None if batch.wanted is None else pinned(torch.from_numpy(batch.wanted))
        rows = None if wanted is None else wanted.to(device, non_blocking=True)
        return replace(batch, token_ids=ids, cu_lengths=bounds, wanted_rows=rows)
    wanted = 0 if batch.wanted is None else len(batch.wanted)
    frame = Frame(batch.tokens, wanted, tagged=batch.tags is not None)
    numbers = host_numbers(batch, frame).to(device, non_blocking=True)
    return frame.view(batch, numbers, batch.tokens)


def host_numbers(batch: PackedBatch, frame: Frame) -> torch.Tensor:
    """Return the numbers of ``batch`` in ``frame``, in memory that a device copies from by itself."""
    size = frame.size(len(batch.lengths))
    numbers = torch.empty(size, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    frame.fill(batch, numbers.numpy())
    return numbers


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in memory that a device copies from by itself."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    start = 0
    bounds = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for first, behind in pairwise(bounds):
        groups.append(Group(start, behind - first, lengths[first]))
        start = groups[-1].end
    return tuple(groups)


def _adapter_runs(adapters: Sequence[str], ends: NDArray[np.int32]) -> tuple[AdapterRun, ...]:
    runs: list[AdapterRun] = []
    item = start = 0
    for adapter, run in groupby(adapters):
        item += sum(1 for _ in run)
        end = int(ends[item - 1])
        runs.append(AdapterRun(start, end, adapter or None))
        start = end
    return tuple(runs)


def split(items: Sequence[Packable], tokens: int) -> list[list[int]]:
    """Cut ``items`` into passes of at most ``tokens`` tokens (or one item), like lengths together.

    Returns the places of the items of each pass.
    """
    order = sorted(range(len(items)), key=lambda i: (items[i].adapter or "", len(items[i].token_ids)))
    passes: list[list[int]] = []
    room = 0
    for i in order:
        size = len(items[i].token_ids)
        if not passes or size > room:
            passes.append([])
            room = tokens
        passes[-1].append(i)
        room -= size
    return passes

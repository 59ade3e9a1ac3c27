"""A ragged batch without padding: the tokens of all items behind one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


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
    """Neighbouring tokens ``[start, end)`` that share a task adapter."""

    start: int
    end: int
    adapter: str | None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Items sorted by adapter, then length, so that equal ones are neighbours and need no padding.

    ``token_ids`` (tokens,) and ``cu_lengths`` (items + 1,) are int32 on the device. ``order[i]`` is the
    place that packed item i had in the input. ``attended`` says for each item how many of its first tokens
    may be attended to; None where every item may see all of itself. ``wanted`` (rows,) int32 are the tokens,
    in rising order, whose last states are asked for; None is all. A network may leave the others wrong.
    """

    token_ids: torch.Tensor
    cu_lengths: torch.Tensor
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    groups: tuple[Group, ...]
    adapter_runs: tuple[AdapterRun, ...]
    attended: tuple[int, ...] | None = None
    wanted: NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all items together."""
        return self.token_ids.shape[0]

    @property
    def max_length(self) -> int:
        """Length of the longest item."""
        return max(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.token_ids.device

    @property
    def wanted_runs(self) -> tuple[AdapterRun, ...]:
        """``adapter_runs`` of the wanted tokens, counted by them."""
        if self.wanted is None:
            return self.adapter_runs
        bounds = np.searchsorted(self.wanted, [(run.start, run.end) for run in self.adapter_runs]).tolist()
        return tuple(
            AdapterRun(start, end, run.adapter)
            for (start, end), run in zip(bounds, self.adapter_runs, strict=True)
            if start < end
        )

    def positions(self) -> torch.Tensor:
        """Place of each token in its item, from 0; (tokens,) int32 on the device."""
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
    if not items:
        raise ValueError("a batch needs at least one item")
    adapters = [item.adapter or "" for item in items]
    sizes = [len(item.token_ids) for item in items]
    order = sorted(range(len(items)), key=lambda i: (adapters[i], sizes[i]))
    lengths = tuple(sizes[i] for i in order)
    ends = np.cumsum(lengths, dtype=np.int32)
    ids = np.concatenate([items[i].token_ids for i in order]).astype(np.int32, copy=False)
    limits.check(ids, lengths, [item.adapter for item in items])
    cu_lengths = np.concatenate([[0], ends]).astype(np.int32)
    return PackedBatch(
        token_ids=_to_device(ids, device),
        cu_lengths=_to_device(cu_lengths, device),
        lengths=lengths,
        order=tuple(order),
        groups=_groups(lengths),
        adapter_runs=_adapter_runs([adapters[i] for i in order], ends),
        attended=_attended([items[i] for i in order]),
    )


def _attended(items: Sequence[Packable]) -> tuple[int, ...] | None:
    if all(item.attended is None for item in items):
        return None
    seen = tuple(len(item.token_ids) if item.attended is None else item.attended for item in items)
    for item, count in zip(items, seen, strict=True):
        if not 0 < count <= len(item.token_ids):
            raise ValueError(f"an item of {len(item.token_ids)} tokens cannot attend to {count} of them")
    return seen


def _to_device(array: NDArray[np.int32], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    start = 0
    for length, run in groupby(lengths):
        groups.append(Group(start, sum(1 for _ in run), length))
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

"""Task adapters of low rank (LoRA) over one copy of the base, from either form of checkpoint.

A layer is ``W x + b + s B_t A_t x`` for a token of task t, a table of words ``E[id] + s A_t[id] B_t``. Tokens
without a task have the base alone, and a batch may mix tasks freely: tokens of a task are neighbours in it,
so each task is two narrow products over its own rows. Source of LoRA: Hu et al., arXiv 2106.09685. The forms:
torch's parametrizations (the tensors of jina-embeddings-v3), and PEFT's directories beside the base
(``lora_linear``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch.nn import functional

from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, Shape, require
from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.cuda import ops as cuda
from services.core.modeling.layers.linear import FusedLinear, Linear
from services.core.modeling.layers.merged import Beside, Merges
from services.core.modeling.layers.packed import AdapterRun
from services.core.modeling.layers.post_norm import LowRank, Norm
from services.core.modeling.layers.reading import Layers
from services.core.modeling.native import ops

Runs: TypeAlias = Sequence[AdapterRun]
"""The adapters of all rows, in order and without gaps."""


_ALIGNED = 8
"""Columns, in 16 bits each, to which products on CUDA want their factors aligned."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a checkpoint: ``names`` in stored order, each of ``rank``, scaled by ``scale``.

    ``merged`` names one that all tokens have: it is added to the weights as they are read, and is the only
    one that is served.
    """

    names: tuple[str, ...] = ()
    rank: int = 0
    scale: float = 0.0
    merged: str | None = None

    @classmethod
    def read(cls, config: Config) -> Adapters:
        """Parse ``lora_*`` of config.json. CheckpointError if they are not there or make no sense."""
        names = cast("list[Any]", require(config, "lora_adaptations", list))
        rank = require(config, "lora_rank", int)
        alpha = require(config, "lora_alpha", int)
        if not names or rank < 1 or len(set(names)) != len(names):
            raise CheckpointError("config.json: 'lora_adaptations' and 'lora_rank' describe no adapters")
        return cls(tuple(map(str, names)), rank, alpha / rank)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Those that a row may have or not: none where one is merged."""
        return self.names if self.merged is None else ()

    def weight(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """Read the weight (out, in) of a layer, the merged adapter, if there is one, added to it in fp32."""
        weight = checkpoint.tensor(weight_name(name, self))
        if self.merged is None:
            return weight
        down, up = self.parts(checkpoint, name)[self.merged]
        return weight.float().addmm_(up, down.float())

    def table(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """Read a table (entries, width) likewise."""
        table = checkpoint.tensor(weight_name(name, self))
        if self.merged is None:
            return table
        down, up = self.parts(checkpoint, name)[self.merged]
        return table.float().addmm_(down.float(), up)

    def parts(self, checkpoint: Checkpoint, name: str) -> dict[str, LowRank]:
        """Read A and, scaled, B of each task for the layer or table ``name``."""
        if not self.names:
            return {}
        where = f"{name}.parametrizations.weight.0"
        first = checkpoint.tensor(f"{where}.lora_A")
        second = checkpoint.tensor(f"{where}.lora_B", torch.float32) * self.scale
        return {task: LowRank(first[i], second[i]) for i, task in enumerate(self.names)}

    def rows(self, checkpoint: Checkpoint, name: str, row: int) -> AdaptedRow:
        """Read one row of the table ``name``, fp32."""
        base = checkpoint.tensor(weight_name(name, self), torch.float32)[row]
        parts = self.parts(checkpoint, name)
        return AdaptedRow(base, {task: base + a[row].float() @ b for task, (a, b) in parts.items()})


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A linear layer; for a task that changes it an A (rank, in) and a scaled, transposed B (rank, out).

    Where ``base`` rests on a task, ``unmerged`` has the weights without any and the changes of all tasks, for
    rows that have each their own.
    """

    base: Linear
    tasks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    unmerged: tuple[Linear, Beside] | None = None

    def __call__(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the product of ``x`` (rows, in), (rows, out)."""
        return self._adapt(x, runs, self._under(runs)(x))

    def gelu(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the product under the erf form of GELU, (rows, out)."""
        if self.plain(runs):
            return self.base.gelu(x)
        return self._adapt(x, runs, self._under(runs)(x), gelu=True)

    def gated(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return ``silu(a) * b`` of the product [a b] on CUDA, (rows, out / 2)."""
        if isinstance(self.base, FusedLinear) and self.plain(runs):
            return self.base.gated(x, gelu=False)
        return cuda.gate(self(x, runs), gelu=False)

    def add(self, x: torch.Tensor, runs: Runs, residual: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), which is left alone."""
        return self._adapt(x, runs, self._under(runs).add(x, residual))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), maybe in the memory of that."""
        return self._adapt(x, runs, self._under(runs).add_to(residual, x))

    def normed(self, x: torch.Tensor, runs: Runs, residual: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return ``norm`` of the product plus ``residual`` (rows, out)."""
        if self.tasks or not self.plain(runs):
            return norm(self.add(x, runs, residual))
        return norm.behind(self.base, x, residual)

    def plain(self, runs: Runs) -> bool:
        """Whether no row of ``runs`` has an adapter here."""
        if _tags(runs) is not None:
            return self.unmerged is None
        return all(run.adapter is None or run.adapter not in self.tasks for run in runs)

    def _under(self, runs: Runs) -> Linear:
        """The layer to whose product ``_adapt`` adds."""
        return self.base if self.unmerged is None or _tags(runs) is None else self.unmerged[0]

    def _adapt(self, x: torch.Tensor, runs: Runs, y: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
        """Add to ``y`` in place what the adapters make of ``x``."""
        if self.unmerged is not None and (tags := _tags(runs)) is not None:
            self.unmerged[1].add_to(y, x, tags)
            return cuda.gelu_(y) if gelu else y
        for run in runs:
            rows = slice(run.start, run.end)
            pair = None if run.adapter is None else self.tasks.get(run.adapter)
            if pair is not None:
                add_low_rank(x[rows], *pair, y[rows], gelu=gelu)
            elif gelu:
                y[rows] = functional.gelu(y[rows])
        return y


def _tags(runs: Runs) -> torch.Tensor | None:
    """The task of each row, where rows have each their own."""
    return runs[0].tags if runs else None


def add_low_rank(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, y: torch.Tensor, *, gelu: bool
) -> None:
    """Add ``(x down^T) up`` to ``y`` in place, then, with ``gelu``, take its GELU.

    ``x`` is (rows, in), ``down`` (rank, in), ``up`` (rank, out), ``y`` (rows, out).
    """
    if ops.serves_lora(x, len(down)):
        ops.lora(x, down, up, y, gelu=gelu)
        return
    y.addmm_(x @ down.T, up)
    if gelu:
        y.copy_(functional.gelu(y))


@dataclass(frozen=True, slots=True)
class AdaptedEmbedding:
    """A table (entries, width) with, for each task, an A (entries, rank) and a scaled B (rank, width).

    ``rests`` has the A and B of the task that the network rests on, where it does, and ``all`` those of all
    tasks: (tasks, entries, rank) and, transposed, (tasks, width, rank).
    """

    table: torch.Tensor
    tasks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rests: tuple[torch.Tensor, torch.Tensor] | None = None
    all: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, ids: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the rows of ``ids`` (tokens,), (tokens, width)."""
        rows = functional.embedding(ids, self.table)
        if self.all is not None and (tags := _tags(runs)) is not None:
            downs, ups = self.all
            places = tags.clamp(min=0).long() * downs.shape[1] + ids
            cuda.expand_(functional.embedding(places, downs.flatten(0, 1)), ups, tags, rows)
            return rows
        if self.rests is not None:
            down, up = self.rests
            return rows.addmm_(functional.embedding(ids, down), up)
        for run in runs:
            if run.adapter is not None:
                down, up = self.tasks[run.adapter]
                rows[run.start : run.end].addmm_(functional.embedding(ids[run.start : run.end], down), up)
        return rows


@dataclass(frozen=True, slots=True)
class AdaptedRow:
    """One row (width,) of a table, and what it is for each task.

    ``all`` (1 + tasks, width) has it without a task and for each, where ``base`` is that of one or the other.
    """

    base: torch.Tensor
    tasks: Mapping[str, torch.Tensor]
    all: torch.Tensor | None = None

    def add_to(self, x: torch.Tensor, runs: Runs) -> None:
        """Add it to each of ``x`` (tokens, width), in place."""
        if self.all is not None and (tags := _tags(runs)) is not None:
            x += functional.embedding(tags + 1, self.all)
            return
        for run in runs:
            x[run.start : run.end] += self.base if run.adapter is None else self.tasks[run.adapter]


class AdaptedLayers:
    """Reads layers and their adapters, if ``adapters`` names any, from the checkpoint of ``layers``."""

    def __init__(self, layers: Layers, adapters: Adapters, merges: Merges | None = None) -> None:
        """With ``merges`` the layers have the task on which the network rests, whatever the runs say."""
        self._layers = layers
        self._merges = merges
        self._checkpoint: Checkpoint = layers.checkpoint
        self._adapters = adapters

    def linear(self, name: str) -> LoraLinear:
        """One layer."""
        bias = self._checkpoint.tensor(f"{name}.bias")
        weight = self._adapters.weight(self._checkpoint, name)
        if self._adapters.merged is not None:
            return LoraLinear(self._layers.joined(weight, bias), {})
        place = self._layers.place
        if self._merges is not None:
            room = -self._adapters.rank % _ALIGNED
            tasks = {
                task: (place(functional.pad(a, (0, 0, 0, room))), place(functional.pad(b, (0, room))))
                for task, (a, b) in self._parts(name).items()
            }
            return _merged(self._layers, self._merges, place(weight), bias, tasks)
        tasks = {task: (place(a), place(b.T.contiguous())) for task, (a, b) in self._parts(name).items()}
        return LoraLinear(self._layers.joined(weight, bias), tasks)

    def embedding(self, name: str) -> AdaptedEmbedding:
        """A table of words."""
        if self._adapters.merged is not None:
            return AdaptedEmbedding(self._layers.place(self._adapters.table(self._checkpoint, name)), {})
        place = self._layers.place
        table = self._layers.tensor(weight_name(name, self._adapters))
        parts = self._parts(name)
        if self._merges is not None and parts:
            # A product of so few columns takes a kernel for unaligned rows, unless they are filled up.
            room, names = -self._adapters.rank % _ALIGNED, self._merges.names
            downs = torch.stack([place(functional.pad(parts[task].a, (0, room))) for task in names])
            ups = torch.stack([place(functional.pad(parts[task].b, (0, 0, 0, room))) for task in names])
            rests = (
                self._merges.choice(torch.zeros_like(downs[0]), dict(zip(names, downs, strict=True))),
                self._merges.choice(torch.zeros_like(ups[0]), dict(zip(names, ups, strict=True))),
            )
            return AdaptedEmbedding(table, {}, rests, (downs, ups.transpose(1, 2).contiguous()))
        tasks = {task: (place(down), place(up)) for task, (down, up) in parts.items()}
        return AdaptedEmbedding(table, tasks)

    def row(self, name: str, row: int) -> AdaptedRow:
        """One row of a table."""
        if self._adapters.merged is not None:
            return AdaptedRow(self._layers.place(self._adapters.table(self._checkpoint, name)[row]), {})
        read, place = self._adapters.rows(self._checkpoint, name, row), self._layers.place
        placed = {task: place(one) for task, one in read.tasks.items()}
        if self._merges is not None:
            rows = torch.stack([place(read.base), *(placed[task] for task in self._merges.names)])
            return AdaptedRow(self._merges.choice(place(read.base), placed), {}, rows)
        return AdaptedRow(place(read.base), placed)

    def _parts(self, name: str) -> dict[str, LowRank]:
        return self._adapters.parts(self._checkpoint, name)


def lora_linear(
    layers: Layers,
    adapters: PeftAdapters,
    names: Sequence[str],
    *,
    bias: bool,
    merges: Merges | None = None,
) -> LoraLinear:
    """Read one layer that computes all of ``names`` behind one another, with its adapters of PEFT's form.

    With ``merges`` it has the task on which the network rests, whatever the runs say.
    """
    weights = [layers.checkpoint.tensor(f"{name}.weight") for name in names]
    offset = torch.cat([layers.checkpoint.tensor(f"{name}.bias") for name in names]) if bias else None
    sizes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    pairs = {task: pair for task in sorted(adapters.names) if (pair := adapters.joined(task, names, sizes))}
    weight, place = torch.cat(weights), layers.place
    if merges is not None:
        merged = {task: (place(pair.down), place(pair.up)) for task, pair in pairs.items()}
        return _merged(layers, merges, place(weight), offset, merged)
    tasks = {task: (place(pair.down), place(pair.up.T.contiguous())) for task, pair in pairs.items()}
    return LoraLinear(layers.joined(weight, offset), tasks)


def _merged(
    layers: Layers,
    merges: Merges,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tasks: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> LoraLinear:
    used, beside = merges.product(weight, tasks)
    unmerged = None if beside is None else (layers.joined(weight, bias), beside)
    return LoraLinear(layers.joined(used, bias), {}, unmerged)


def weight_name(name: str, adapters: Adapters) -> str:
    """Name of the base weight of a layer."""
    return f"{name}.parametrizations.weight.original" if adapters.names else f"{name}.weight"


def adapted_linear_shapes(name: str, out: int, into: int, adapters: Adapters) -> Mapping[str, Shape]:
    """Names and shapes of a linear layer and its adapters."""
    parts = _adapter_shapes(name, (adapters.rank, into), (out, adapters.rank), adapters)
    return {weight_name(name, adapters): (out, into), f"{name}.bias": (out,), **parts}


def adapted_embedding_shapes(name: str, rows: int, width: int, adapters: Adapters) -> Mapping[str, Shape]:
    """Names and shapes of a table and its adapters, whose A and B have swapped roles."""
    parts = _adapter_shapes(name, (rows, adapters.rank), (adapters.rank, width), adapters)
    return {weight_name(name, adapters): (rows, width), **parts}


def _adapter_shapes(
    name: str, first: Sequence[int], second: Sequence[int], adapters: Adapters
) -> dict[str, Shape]:
    if not adapters.names:
        return {}
    tasks, where = len(adapters.names), f"{name}.parametrizations.weight.0"
    return {f"{where}.lora_A": (tasks, *first), f"{where}.lora_B": (tasks, *second)}

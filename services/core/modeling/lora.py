"""Task adapters of low rank (LoRA), chosen token by token over one copy of the base weights.

An adapted layer is ``W x + b + s B_t A_t x`` for a token of task t. All tasks stand side by side: their A
give one narrow product, whose columns of other tasks are set to zero; their B stand behind the columns of W,
so that base and adapters are a single product over a slightly longer row. A batch may mix tasks freely, and
tokens without a task have zeros throughout. Source of LoRA: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional

from services.core.modeling.checkpoint import Checkpoint, CheckpointError, Config, Shape, require
from services.core.modeling.layers import Layers
from services.core.modeling.linear import Linear
from services.core.modeling.packed import PackedBatch

_ALIGN = 32
"""The columns of all adapters together are filled up with zeros to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a checkpoint: ``names`` in stored order, each of ``rank``, scaled by ``scale``."""

    names: tuple[str, ...] = ()
    rank: int = 0
    scale: float = 0.0

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
    def columns(self) -> int:
        """Columns of all adapters side by side, filled up."""
        return -(-len(self.names) * self.rank // _ALIGN) * _ALIGN

    def slots(self, batch: PackedBatch, dtype: torch.dtype) -> Slots | None:
        """Which columns each token of ``batch`` uses; None if no item has an adapter."""
        if all(run.adapter is None for run in batch.adapter_runs):
            return None
        mask = torch.zeros(batch.tokens, self.columns, dtype=dtype, device=batch.device)
        task = torch.zeros(batch.tokens, dtype=torch.int32, device=batch.device)
        for run in batch.adapter_runs:
            if run.adapter is None:
                continue
            index = self.names.index(run.adapter)
            mask[run.start : run.end, index * self.rank : (index + 1) * self.rank] = 1
            task[run.start : run.end] = index + 1
        return Slots(mask, task)


@dataclass(frozen=True, slots=True)
class Slots:
    """``mask`` (tokens, columns) is 1 in the columns of a token's adapter; ``task`` (tokens,) 0 is none."""

    mask: torch.Tensor
    task: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """A linear layer with the adapters of all tasks; ``down`` is None where the checkpoint has none."""

    whole: Linear
    down: Linear | None
    columns: int

    def __call__(self, x: torch.Tensor, slots: Slots | None) -> torch.Tensor:
        """Return the product, (rows, out)."""
        return self.whole(self._lengthen(x, slots))

    def gelu(self, x: torch.Tensor, slots: Slots | None) -> torch.Tensor:
        """Return the product under the erf form of GELU, (rows, out)."""
        return self.whole.gelu(self._lengthen(x, slots))

    def add(self, x: torch.Tensor, slots: Slots | None, residual: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual``, (rows, out)."""
        return self.whole.add(self._lengthen(x, slots), residual)

    def _lengthen(self, x: torch.Tensor, slots: Slots | None) -> torch.Tensor:
        if self.down is None:
            return x
        if slots is None:
            return functional.pad(x, (0, self.columns))
        return torch.cat([x, self.down.mul(x, slots.mask)], dim=1)


@dataclass(frozen=True, slots=True)
class AdaptedEmbedding:
    """A table of words with the adapters of all tasks, (vocabulary, columns) and (columns, width)."""

    table: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None

    def __call__(self, ids: torch.Tensor, slots: Slots | None) -> torch.Tensor:
        """Return the rows of ``ids`` (tokens,), (tokens, width)."""
        rows = functional.embedding(ids, self.table)
        if slots is None or self.down is None or self.up is None:
            return rows
        low = functional.embedding(ids, self.down) * slots.mask[:, : self.down.shape[1]]
        return torch.addmm(rows, low, self.up)


class AdaptedLayers:
    """Reads layers and their adapters from a checkpoint in the form of torch's parametrizations."""

    def __init__(self, layers: Layers, adapters: Adapters) -> None:
        self._layers = layers
        self._checkpoint: Checkpoint = layers.checkpoint
        self._adapters = adapters

    def linear(self, name: str) -> AdaptedLinear:
        """One layer."""
        bias = self._checkpoint.tensor(f"{name}.bias")
        weight = self._checkpoint.tensor(weight_name(name, self._adapters))
        if not self._adapters.names:
            return AdaptedLinear(self._layers.joined(weight, bias), None, 0)
        down = self._part(name, "lora_A")  # (tasks, rank, in)
        up = self._part(name, "lora_B")  # (tasks, out, rank)
        filler = self._adapters.columns - len(self._adapters.names) * self._adapters.rank
        side = up.permute(1, 0, 2).reshape(weight.shape[0], -1) * self._adapters.scale
        whole = torch.cat([weight, functional.pad(side, (0, filler))], dim=1)
        narrow = functional.pad(down.reshape(-1, weight.shape[1]), (0, 0, 0, filler))
        return AdaptedLinear(
            self._layers.joined(whole, bias), self._layers.joined(narrow, None), self._adapters.columns
        )

    def embedding(self, name: str) -> AdaptedEmbedding:
        """A table of words."""
        table = self._layers.tensor(weight_name(name, self._adapters))
        if not self._adapters.names:
            return AdaptedEmbedding(table, None, None)
        down = self._part(name, "lora_A").permute(1, 0, 2).flatten(1)  # (tasks, rows, rank)
        up = self._part(name, "lora_B").flatten(0, 1) * self._adapters.scale  # (tasks, rank, width)
        return AdaptedEmbedding(table, self._layers.place(down), self._layers.place(up))

    def rows(self, name: str, row: int) -> torch.Tensor:
        """One row of a table without an adapter and with each, (1 + tasks, width)."""
        base = self._checkpoint.tensor(weight_name(name, self._adapters), torch.float32)[row]
        variants = [base]
        if self._adapters.names:
            down = self._part(name, "lora_A").float()[:, row]
            up = self._part(name, "lora_B").float() * self._adapters.scale
            variants += [base + a @ b for a, b in zip(down, up, strict=True)]
        return self._layers.place(torch.stack(variants))

    def _part(self, name: str, part: str) -> torch.Tensor:
        return self._checkpoint.tensor(f"{name}.parametrizations.weight.0.{part}")


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

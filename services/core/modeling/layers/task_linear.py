"""A linear layer with an adapter for each task, over one copy of its weight.

``W x + U_t D_t x``, where t is the task of a token. Tokens of a task are neighbours in a packed batch, so
each task is two narrow products over its own rows; the second one takes what is added besides, and the
wide product takes the result of that, so that no sum is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.merged import Merges
from services.core.modeling.layers.packed import AdapterRun
from services.core.modeling.layers.reading import Layers

Runs: TypeAlias = Sequence[AdapterRun]
"""The adapters of all rows, in order and without gaps."""


@dataclass(frozen=True, slots=True)
class TaskLinear:
    """``base`` for all tasks, ``tasks`` the narrow layers (down, up) of those that change it."""

    base: Linear
    out: int
    tasks: Mapping[str, tuple[Linear, Linear]]

    def plain(self, runs: Runs) -> bool:
        """Whether no row of ``runs`` has an adapter here."""
        return all(run.adapter is None or run.adapter not in self.tasks for run in runs)

    def __call__(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the product of ``x`` (rows, in), (rows, out)."""
        if self.plain(runs):
            return self.base(x)
        return self.base.add(x, self._changes(x, runs, None))

    def add(self, x: torch.Tensor, runs: Runs, residual: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), which is left alone."""
        if self.plain(runs):
            return self.base.add(x, residual)
        return self.base.add(x, self._changes(x, runs, residual))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return the product plus ``residual`` (rows, out), maybe in the memory of that."""
        if self.plain(runs):
            return self.base.add_to(residual, x)
        return self.add(x, runs, residual)

    def _changes(self, x: torch.Tensor, runs: Runs, residual: torch.Tensor | None) -> torch.Tensor:
        """Return what the adapters make of ``x``, plus ``residual``."""
        changes = [self._change(x, run, residual) for run in runs]
        return changes[0] if len(changes) == 1 else torch.cat(changes)

    def _change(self, x: torch.Tensor, run: AdapterRun, residual: torch.Tensor | None) -> torch.Tensor:
        rows = slice(run.start, run.end)
        layers = None if run.adapter is None else self.tasks.get(run.adapter)
        if layers is None:
            return x.new_zeros(run.end - run.start, self.out) if residual is None else residual[rows]
        down, up = layers
        low = down(x[rows])
        return up(low) if residual is None else up.add(low, residual[rows])


def task_linear(
    layers: Layers,
    adapters: PeftAdapters,
    names: Sequence[str],
    *,
    bias: bool,
    merges: Merges | None = None,
) -> TaskLinear:
    """Read one layer that computes all of ``names`` behind one another, with its adapters.

    With ``merges`` it has the task on which the network rests, whatever the runs say.
    """
    weights = [layers.checkpoint.tensor(f"{name}.weight") for name in names]
    offset = torch.cat([layers.checkpoint.tensor(f"{name}.bias") for name in names]) if bias else None
    sizes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    pairs = {task: pair for task in sorted(adapters.names) if (pair := adapters.joined(task, names, sizes))}
    weight, out = torch.cat(weights), sum(out for out, _ in sizes)
    if merges is not None:
        merged = {task: (layers.place(pair.down), layers.place(pair.up)) for task, pair in pairs.items()}
        return TaskLinear(layers.joined(merges.product(layers.place(weight), merged), offset), out, {})
    tasks = {
        task: (layers.joined(pair.down, None), layers.joined(pair.up, None)) for task, pair in pairs.items()
    }
    return TaskLinear(layers.joined(weight, offset), out, tasks)

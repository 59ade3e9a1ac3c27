"""Weights that a network with task adapters rests on: the base with one task's changes in it.

Where passes take milliseconds, narrow products beside the wide ones cost a third of the time. So a pass there
has one task, whose changes are added to the weights before it: reading and writing the weights once, when the
task is another than that of the pass before. A small batch of several tasks is one pass all the same, over
the weights without changes, with the narrow products of all tasks together beside them (``Beside``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.cuda.recording import Recorder
from services.core.modeling.layers.packed import AdapterRun


@dataclass(frozen=True, slots=True)
class Beside:
    """The changes of all tasks to one layer: ``downs`` (tasks, rank, in) and ``ups`` (tasks, out, rank)."""

    downs: torch.Tensor
    ups: torch.Tensor

    def add_to(self, y: torch.Tensor, x: torch.Tensor, tags: torch.Tensor) -> None:
        """Add to ``y`` (rows, out), in place, what the task of each row, in ``tags``, makes of ``x``."""
        cuda.add_low_rank(x, self.downs, self.ups, tags, y)


class Merges:
    """The weights in use of one network, and what each task makes of them. Callers take turns.

    ``names`` are the tasks in the order of ``AdapterRun.tags``.
    """

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._graphs: dict[str | None, torch.cuda.CUDAGraph] = {}
        self._products: list[tuple[torch.Tensor, torch.Tensor, Mapping[str, tuple[torch.Tensor, ...]]]] = []
        self._choices: list[tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]] = []
        self._task: str | None = None
        self._torn = False

    @classmethod
    def on(cls, device: torch.device, names: Sequence[str]) -> Merges | None:
        """Return merges for a network on ``device``, None where adapters stay beside the weights."""
        return cls(device, names) if cuda.serves_device(device) else None

    def product(
        self, base: torch.Tensor, tasks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, Beside | None]:
        """Return weights in use (out, in), and the changes of all tasks for where those are not in use.

        They are ``base``, and of a task its (rank, in) and (out, rank) besides. None where no task has any.
        """
        if not tasks:
            return base, None
        used = base.clone()
        rank = max(len(down) for down, _ in tasks.values())
        downs = base.new_zeros(len(self.names), rank, base.shape[1])
        ups = base.new_zeros(len(self.names), base.shape[0], rank)
        for task, (down, up) in tasks.items():
            place = self.names.index(task)
            downs[place, : len(down)] = down
            ups[place, :, : len(down)] = up
        own = {task: (downs[self.names.index(task)], ups[self.names.index(task)]) for task in tasks}
        self._products.append((base, used, own))
        return used, Beside(downs, ups)

    def choice(self, base: torch.Tensor, tasks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a tensor in use: ``base``, or what a task has in its place."""
        if not tasks:
            return base
        used = base.clone()
        self._choices.append((base, used, tasks))
        return used

    def tags(self, runs: Sequence[AdapterRun]) -> NDArray[np.int32]:
        """Return the task of each row of ``runs``, -1 for none; (rows,)."""
        places = [-1 if run.adapter is None else self.names.index(run.adapter) for run in runs]
        return np.repeat(np.array(places, np.int32), [run.end - run.start for run in runs])

    @property
    def task(self) -> str | None:
        """What the network rests on."""
        return self._task

    def rest_on(self, task: str | None) -> None:
        """Put the changes of ``task`` into the weights in use; None takes all out."""
        if task == self._task and not self._torn:
            return
        self._torn = True  # until all is written, should it fail midway
        if self._recorder is None:
            self._write(task)
        else:
            if task not in self._graphs:
                self._graphs[task], _ = self._recorder.record(lambda: self._write(task))
            self._graphs[task].replay()
        self._task = task
        self._torn = False

    def _write(self, task: str | None) -> None:
        for base, used, pairs in self._products:
            pair = None if task is None else pairs.get(task)
            if pair is None:
                used.copy_(base)
            else:
                down, up = pair
                cuda.merge(base, down, up, used)
        for base, used, tasks in self._choices:
            used.copy_(base if task is None else tasks.get(task, base))

"""Weights that a network with task adapters rests on: the base with one task's changes in it.

Where passes take milliseconds, narrow products beside the wide ones cost a third of the time. So a pass there
has one task, whose changes are added to the weights before it: reading and writing the weights once, when the
task is another than that of the pass before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from services.core.modeling.cuda import ops as cuda
from services.core.modeling.cuda.recording import Recorder


class Merges:
    """The weights in use of one network, and what each task makes of them. Callers take turns."""

    def __init__(self, device: torch.device) -> None:
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._graphs: dict[str | None, torch.cuda.CUDAGraph] = {}
        self._products: list[tuple[torch.Tensor, torch.Tensor, _Pairs]] = []
        self._choices: list[tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]] = []
        self._task: str | None = None
        self._torn = False

    @classmethod
    def on(cls, device: torch.device) -> Merges | None:
        """Return merges for a network on ``device``, None where adapters stay beside the weights."""
        return cls(device) if cuda.serves_device(device) else None

    def product(self, base: torch.Tensor, tasks: _Pairs) -> torch.Tensor:
        """Return weights in use (out, in): ``base``, and of a task its (rank, in) and (out, rank) besides."""
        if not tasks:
            return base
        used = base.clone()
        self._products.append((base, used, tasks))
        return used

    def choice(self, base: torch.Tensor, tasks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a tensor in use: ``base``, or what a task has in its place."""
        if not tasks:
            return base
        used = base.clone()
        self._choices.append((base, used, tasks))
        return used

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


_Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

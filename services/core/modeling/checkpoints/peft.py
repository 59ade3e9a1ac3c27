"""Task adapters beside a base model, as the peft library writes them.

``adapters/<task>/adapter_config.json`` and ``adapter_model.safetensors``, or both in ``adapters`` itself for
all tasks together, whose names are then in those of the tensors. Those are matched by pattern: prefixes and
the slots behind ``lora_A`` differ between versions of that library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from services.core.modeling.checkpoints.checkpoint import CheckpointError, read_json, require

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?P<module>.+)\.lora_(?P<side>[AB])"
    r"(?:\.default)?(?:\.(?P<slot>[^.]+))?\.weight"
)
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a layer's weight: ``up`` (out, rank) times ``down`` (rank, in)."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class PeftAdapters:
    """For each task the layers it changes, by name."""

    tasks: Mapping[str, Mapping[str, LowRank]] = field(default_factory=dict[str, Mapping[str, LowRank]])

    @property
    def names(self) -> frozenset[str]:
        """The tasks that have an adapter."""
        return frozenset(self.tasks)

    @classmethod
    def read(
        cls, directory: Path, layers: Mapping[str, tuple[int, int]], wanted: Sequence[str]
    ) -> PeftAdapters:
        """Read every adapter below ``directory`` for ``layers``, name to (out, in).

        CheckpointError for a tensor that is missing, left over or of the wrong shape, for a kind of adapter
        that is not served, and if one of ``wanted`` is not there.
        """
        if (directory / "adapter_config.json").is_file():
            found = [directory]
        else:
            found = sorted(path.parent for path in directory.glob("*/adapter_config.json"))
        adapters = [adapter for path in found for adapter in _Adapter.open(path, alone=path != directory)]
        tasks = {adapter.task: adapter.pairs(layers) for adapter in adapters}
        if lacking := sorted(set(wanted) - tasks.keys()):
            raise CheckpointError(f"{directory}: no adapters {', '.join(lacking)}")
        return cls(tasks)

    @property
    def rank(self) -> int:
        """The largest rank of a layer's change; 0 without any."""
        pairs = (pair for layers in self.tasks.values() for pair in layers.values())
        return max((pair.down.shape[0] for pair in pairs), default=0)

    def joined(self, task: str, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> LowRank | None:
        """Return what ``task`` adds to the layers ``names`` behind one another; None if nothing.

        They share their input; ``sizes`` are their (out, in).
        """
        pairs = [self.tasks[task].get(name) for name in names]
        if not any(pairs):
            return None
        down = [
            torch.empty(0, into) if pair is None else pair.down
            for pair, (_, into) in zip(pairs, sizes, strict=True)
        ]
        up = [
            torch.empty(out, 0) if pair is None else pair.up
            for pair, (out, _) in zip(pairs, sizes, strict=True)
        ]
        return LowRank(torch.cat(down), torch.block_diag(*up))


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One task's tensors in fp32 by layer and side, and what the configuration of its directory says."""

    path: Path
    task: str
    rank: int
    scale: float
    targets: Sequence[str] | None
    tensors: Mapping[tuple[str, str], torch.Tensor]

    @classmethod
    def open(cls, path: Path, *, alone: bool) -> list[_Adapter]:
        """Read configuration and tensors of a directory: of the task it is named for, or of those in it."""
        source = str(path / "adapter_config.json")
        config = read_json(path / "adapter_config.json")
        _refuse_other_kinds(source, config)
        rank = require(config, "r", int, source=source)
        alpha = require(config, "lora_alpha", float, source=source)
        if rank < 1:
            raise CheckpointError(f"{source}: 'r' must be at least 1")
        targets = config.get("target_modules")
        modules = [str(name) for name in cast("list[Any]", targets)] if isinstance(targets, list) else None
        tensors = _tensors(path, path.name if alone else None)
        return [cls(path, task, rank, alpha / rank, modules, own) for task, own in sorted(tensors.items())]

    def pairs(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, LowRank]:
        """Return the pair of each layer that the adapter changes."""
        named = {module for module, _ in self.tensors}
        changed = {name for name in layers if self._changes(name, named)}
        expected = {(name, side) for name in changed for side in "AB"}
        self._complain("lacks", expected - self.tensors.keys())
        self._complain("has for no layer that it may change", self.tensors.keys() - expected)
        return {name: self._pair(name, *layers[name]) for name in sorted(changed)}

    def _changes(self, layer: str, named: set[str]) -> bool:
        if self.targets is None:
            return layer in named
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)

    def _pair(self, layer: str, out: int, into: int) -> LowRank:
        down, up = self.tensors[layer, "A"], self.tensors[layer, "B"]
        for side, tensor, shape in (("A", down, (self.rank, into)), ("B", up, (out, self.rank))):
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{self.path}: lora_{side} of {layer} is {list(tensor.shape)} and should be {list(shape)}"
                )
        return LowRank(down, up * self.scale)

    def _complain(self, what: str, keys: set[tuple[str, str]]) -> None:
        if keys:
            names = sorted(f"{layer}.lora_{side}" for layer, side in keys)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{self.path}: the adapter {what}: {', '.join(names[:_SHOWN])}{more}")


def _refuse_other_kinds(source: str, config: Mapping[str, Any]) -> None:
    plain: Mapping[str, Sequence[object]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_dora": (False, None),
        "use_rslora": (False, None),
        "fan_in_fan_out": (False, None),
        "modules_to_save": (None, []),
        "rank_pattern": (None, {}),
        "alpha_pattern": (None, {}),
    }
    for name, values in plain.items():
        if config.get(name) not in values:
            raise CheckpointError(f"{source}: '{name}' is {config.get(name)!r}, which is not served")


def _tensors(path: Path, only: str | None) -> dict[str, dict[tuple[str, str], torch.Tensor]]:
    """Read the tensors by task, which is ``only`` or else stands in each name."""
    file = path / "adapter_model.safetensors"
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
    tasks: dict[str, dict[tuple[str, str], torch.Tensor]] = {}
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        task = only or (match and match["slot"])
        if match is None or not task or match["slot"] not in (None, task) or not tensor.is_floating_point():
            raise CheckpointError(f"{file}: '{name}' is no tensor of this adapter")
        key, tensors = (match["module"], match["side"]), tasks.setdefault(task, {})
        if key in tensors:
            raise CheckpointError(f"{file}: '{name}' is there twice under different names")
        tensors[key] = tensor.float()
    return tasks if tasks or only is None else {only: {}}

"""From a catalogue entry and a directory to a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, read_json
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.families.table import FAMILIES, Network
from services.core.modeling.types import Door, TextEncoder


def load_network(spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype) -> Network:
    """Load the model of ``directory`` as the network that ``spec.family`` names.

    CheckpointError if the configuration is that of another network, if a tensor is missing, left over or
    of the wrong shape, if a file is broken, or if the vectors have not the width the catalogue promises.
    """
    family = FAMILIES.get(spec.family)
    if family is None:
        raise CheckpointError(f"{spec.id}: no network '{spec.family}'; there are {', '.join(FAMILIES)}")
    checkpoint = Checkpoint(directory)
    if not family.recognises(checkpoint.config):
        raise CheckpointError(_foreign(spec, checkpoint))
    backend = family.load(spec, checkpoint, device, dtype)
    if spec.dimensions and backend.width != spec.dimensions:
        raise CheckpointError(
            f"{directory}: vectors of {backend.width} numbers, {spec.id} has {spec.dimensions}"
        )
    return backend


def load_text_encoder(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """As ``load_network``, of a family that embeds texts."""
    return cast(TextEncoder, _load(Door.EMBEDS, spec, directory, device, dtype))


def load_cross_encoder(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> CrossEncoder:
    """As ``load_network``, of a family that scores pairs."""
    return cast(CrossEncoder, _load(Door.SCORES_PAIRS, spec, directory, device, dtype))


def recognised(directory: Path) -> list[str]:
    """Name the families whose networks the configuration in ``directory`` may be of.

    CheckpointError if it cannot be read.
    """
    return _recognised(read_json(directory / "config.json"))


def _load(door: Door, spec: ModelSpec, directory: Path, device: torch.device, dtype: torch.dtype) -> Network:
    family = FAMILIES.get(spec.family)
    if family is not None and family.door is not door:
        raise CheckpointError(f"{spec.id}: '{spec.family}' {family.door}, which is not what was asked for")
    return load_network(spec, directory, device=device, dtype=dtype)


def _foreign(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    known = _recognised(checkpoint.config)
    found = f"it looks like '{known[0]}'" if known else "it is of no network served here"
    config = checkpoint.config
    kind = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    return f"{checkpoint.directory}: {spec.id} is a '{spec.family}' model, but {found} ({kind})"


def _recognised(config: Config) -> list[str]:
    return [name for name, family in FAMILIES.items() if family.recognises(config)]

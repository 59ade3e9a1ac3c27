"""From a catalogue entry and a directory to a model in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoint import Checkpoint, CheckpointError
from services.core.modeling.families import FAMILIES
from services.core.modeling.types import TextEncoder


def load_text_encoder(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
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
    encoder = family.load(spec, checkpoint, device, dtype)
    if spec.dimensions and encoder.width != spec.dimensions:
        raise CheckpointError(
            f"{directory}: vectors of {encoder.width} numbers, {spec.id} has {spec.dimensions}"
        )
    return encoder


def _foreign(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    known = [name for name, family in FAMILIES.items() if family.recognises(checkpoint.config)]
    found = f"it looks like '{known[0]}'" if known else "it is of no network served here"
    config = checkpoint.config
    kind = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    return f"{checkpoint.directory}: {spec.id} is a '{spec.family}' model, but {found} ({kind})"

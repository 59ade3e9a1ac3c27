"""From a catalogue entry and a directory to a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, read_json
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.families.listwise import ListwiseRanker
from services.core.modeling.families.table import CROSS_ENCODERS, FAMILIES, LISTWISE, Family, M
from services.core.modeling.types import TextEncoder

Network = TextEncoder | CrossEncoder | ListwiseRanker


def load_text_encoder(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load the model of ``directory`` as the network that ``spec.family`` names.

    CheckpointError if the configuration is that of another network, if a tensor is missing, left over or
    of the wrong shape, if a file is broken, or if the vectors have not the width the catalogue promises.
    """
    family, checkpoint = _open(spec, directory, FAMILIES)
    encoder = family.load(spec, checkpoint, device, dtype)
    if spec.dimensions and encoder.width != spec.dimensions:
        raise CheckpointError(
            f"{directory}: vectors of {encoder.width} numbers, {spec.id} has {spec.dimensions}"
        )
    return encoder


def load_cross_encoder(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> CrossEncoder:
    """Load the model of ``directory`` as the cross-encoder that ``spec.family`` names; raises as above."""
    family, checkpoint = _open(spec, directory, CROSS_ENCODERS)
    return family.load(spec, checkpoint, device, dtype)


def load_listwise_ranker(
    spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype
) -> ListwiseRanker:
    """Load the model of ``directory`` as the listwise reranker ``spec.family``; raises as above."""
    family, checkpoint = _open(spec, directory, LISTWISE)
    ranker = family.load(spec, checkpoint, device, dtype)
    if ranker.width != spec.dimensions:
        raise CheckpointError(
            f"{directory}: vectors of {ranker.width} numbers, {spec.id} has {spec.dimensions}"
        )
    return ranker


def load_network(spec: ModelSpec, directory: Path, *, device: torch.device, dtype: torch.dtype) -> Network:
    """Load a model of whichever kind; raises as above."""
    if spec.family in CROSS_ENCODERS:
        return load_cross_encoder(spec, directory, device=device, dtype=dtype)
    if spec.family in LISTWISE:
        return load_listwise_ranker(spec, directory, device=device, dtype=dtype)
    return load_text_encoder(spec, directory, device=device, dtype=dtype)


def recognised(directory: Path) -> list[str]:
    """Name the families whose networks the configuration in ``directory`` may be of.

    CheckpointError if it cannot be read.
    """
    return _recognised(read_json(directory / "config.json"))


def _open(
    spec: ModelSpec, directory: Path, families: Mapping[str, Family[M]]
) -> tuple[Family[M], Checkpoint]:
    family = families.get(spec.family)
    if family is None:
        raise CheckpointError(f"{spec.id}: no network '{spec.family}'; there are {', '.join(families)}")
    checkpoint = Checkpoint(directory)
    if not family.recognises(checkpoint.config):
        raise CheckpointError(_foreign(spec, checkpoint))
    return family, checkpoint


def _foreign(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    known = _recognised(checkpoint.config)
    found = f"it looks like '{known[0]}'" if known else "it is of no network served here"
    config = checkpoint.config
    kind = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    return f"{checkpoint.directory}: {spec.id} is a '{spec.family}' model, but {found} ({kind})"


def _recognised(config: Config) -> list[str]:
    families = {**FAMILIES, **CROSS_ENCODERS, **LISTWISE}
    return [name for name, family in families.items() if family.recognises(config)]

"""From a catalogue entry to a warm network, by what the settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from services.core.catalog.types import ModelSpec
from services.core.catalog.weights import locate
from services.core.inference.memory import weight_bytes
from services.core.modeling.cuda import ops as cuda
from services.core.modeling.device import choose_dtype
from services.core.modeling.families.table import FAMILIES, Network
from services.core.modeling.native.causal import keeps_bf16
from services.core.modeling.registry import load_network
from services.core.settings import Settings

Loader = Callable[[ModelSpec, Settings, torch.device], Network]
WeightBytes = Callable[[ModelSpec, Settings, torch.device], int]


def load_model(spec: ModelSpec, settings: Settings, device: torch.device) -> Network:
    """Load a model from where its weights are, and warm it up.

    Raises WeightsNotFound, and CheckpointError for weights that are not its own.
    """
    dtype = choose_dtype(device, settings.dtype)
    network = load_network(spec, locate(spec, settings), device=device, dtype=dtype)
    network.warm_up()
    return network


def model_weight_bytes(spec: ModelSpec, settings: Settings, device: torch.device) -> int:
    """Return the bytes that the weights will take; raises WeightsNotFound and CheckpointError."""
    return weight_bytes_in(locate(spec, settings), spec, settings, device)


def weight_bytes_in(directory: Path, spec: ModelSpec, settings: Settings, device: torch.device) -> int:
    """As ``model_weight_bytes``, of the weights in ``directory``."""
    dtype = choose_dtype(device, settings.dtype)
    narrow = FAMILIES[spec.family].narrow if keeps_bf16(device, dtype) else ()
    return weight_bytes(directory, dtype, merged=cuda.serves_device(device), narrow=narrow)

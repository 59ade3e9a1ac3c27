"""The decoders in transformers' own classes, in float64, adapters merged into the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    EuroBertConfig,
    EuroBertModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

_NOT_OF_THE_NETWORK = ("architectures", "auto_map", "model_type", "task_names", "torch_dtype")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "nano": (EuroBertConfig, EuroBertModel),
    "small": (Qwen3Config, Qwen3Model),
    "code": (Qwen2Config, Qwen2Model),
    "ranker": (Qwen3Config, Qwen3Model),
}


def stock_model(directory: Path, kind: str, task: str | None = None) -> PreTrainedModel:
    """Load a checkpoint as ``kind``, with the adapter of ``task``."""
    config = json.loads((directory / "config.json").read_text())
    fields = {name: value for name, value in config.items() if name not in _NOT_OF_THE_NETWORK}
    make_config, make_model = _CLASSES[kind]
    model = make_model(make_config(**fields, attn_implementation="eager")).double().eval()
    tensors = {
        name.removeprefix("model."): tensor.double()
        for name, tensor in load_file(directory / "model.safetensors").items()
        if not name.startswith(("lm_head.", "projector."))
    }
    if task is not None:
        merge(tensors, directory / "adapters" / task)
    model.load_state_dict(tensors, strict=True)
    return model


def merge(tensors: dict[str, torch.Tensor], adapter: Path) -> None:
    """Add an adapter to the weights it changes."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, down in stored.items():
        if "lora_A" not in name:
            continue
        up = stored[name.replace("lora_A", "lora_B")]
        layer = re.search(r"layers\..*_proj", name)
        assert layer is not None
        tensors[f"{layer[0]}.weight"] += config["lora_alpha"] / config["r"] * up.double() @ down.double()


def states(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """The hidden states of one text, (tokens, width) float64."""
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids).long()[None]).last_hidden_state[0]


def last_state(directory: Path, kind: str, ids: np.ndarray, task: str | None = None) -> np.ndarray:
    """The hidden state of the last token, (width,) float64."""
    return states(stock_model(directory, kind, task), ids)[-1].numpy()

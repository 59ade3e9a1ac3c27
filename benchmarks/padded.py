"""The plain way to run an encoder: torch modules, a batch padded to its longest text, masked attention."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from services.core.modeling.types import EncodeItem
from tests.modeling.reference import merged
from tests.modeling.test_jina_v3 import in_transformers_names

Runner = Callable[[Sequence[EncodeItem]], torch.Tensor]


def _pad(items: Sequence[EncodeItem], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(item.token_ids) for item in items)
    ids = np.zeros((len(items), longest), np.int64)
    mask = np.zeros((len(items), longest), np.int64)
    for i, item in enumerate(items):
        ids[i, : len(item.token_ids)] = item.token_ids
        mask[i, : len(item.token_ids)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def padded_v3(directory: Path, device: torch.device) -> Runner:
    """transformers' own class with the base weights, in bf16."""
    config = json.loads((directory / "config.json").read_text())
    known = JinaEmbeddingsV3Config().to_dict().keys()
    model = JinaEmbeddingsV3Model(
        JinaEmbeddingsV3Config(**{name: value for name, value in config.items() if name in known})
    )
    stored = load_file(directory / "model.safetensors")
    plain = merged({name.removeprefix("roberta."): t for name, t in stored.items()}, config, None)
    model.load_state_dict(in_transformers_names(plain), strict=True)
    model = model.to(device, torch.bfloat16).eval()

    def run(items: Sequence[EncodeItem]) -> torch.Tensor:
        ids, mask = _pad(items, device)
        with torch.inference_mode():
            return _mean(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    return run


class _Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.gated = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width)
        self.norm_a, self.norm_b = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        form = (batch, length, self.heads, width // self.heads)
        query, key, value = (
            part(x).view(form).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = self.norm_a(x + self.out(mixed.transpose(1, 2).reshape(x.shape)))
        gate, straight = self.gated(x).chunk(2, dim=-1)
        return self.norm_b(x + self.down(gelu(gate) * straight))


def padded_jina_bert(directory: Path, device: torch.device) -> Runner:
    """JinaBERT in bf16 with random weights of its own: only its speed is asked for."""
    config = json.loads((directory / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    dtype = torch.bfloat16
    words = nn.Embedding(config["vocab_size"], width).to(device, dtype)
    blocks = [
        _Block(width, config["intermediate_size"], heads).to(device, dtype).eval()
        for _ in range(config["num_hidden_layers"])
    ]
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]

    def run(items: Sequence[EncodeItem]) -> torch.Tensor:
        ids, mask = _pad(items, device)
        places = torch.arange(ids.shape[1], device=device)
        alibi = -(places[:, None] - places).abs() * torch.tensor(slopes, device=device)[:, None, None]
        hidden = (1 - mask)[:, None, None, :] * torch.finfo(dtype).min
        with torch.inference_mode():
            bias = (alibi + hidden).to(dtype)
            x = words(ids)
            for block in blocks:
                x = block(x, bias)
            return _mean(x, mask)

    return run

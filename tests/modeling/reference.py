"""The networks written down slowly, in float64 and one text at a time, from their papers and checkpoints.

Nothing here is shared with the code under test but the names of the tensors.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Tensors = Mapping[str, torch.Tensor]


def tensors_of(directory: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float64, ``prefix`` taken off."""
    loaded = load_file(directory / "model.safetensors")
    return {name.removeprefix(prefix): tensor.double() for name, tensor in loaded.items()}


def _once(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Remember states: each instruction set is held to those of the same weights and ids."""
    known: dict[str, torch.Tensor] = {}

    @functools.wraps(network)
    def remembering(w: Tensors, config: Mapping[str, Any], ids: np.ndarray, **options: Any) -> torch.Tensor:
        digest = hashlib.sha256(repr((sorted(config.items()), options)).encode() + ids.tobytes())
        for name in sorted(w):
            digest.update(name.encode() + w[name].contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in known:
            known[key] = network(w, config, ids, **options)
        return known[key].clone()

    return remembering


def alibi_bias(heads: int, length: int) -> torch.Tensor:
    """(heads, length, length): each head's slope times the distance, negative."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    twice = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)]
    slopes = torch.tensor(first + twice[0::2][: heads - power], dtype=torch.float64)
    distance = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        distance[i] = (torch.arange(length) - i).abs()
    return -slopes[:, None, None] * distance


@_once
def jina_bert(
    w: Tensors, config: Mapping[str, Any], ids: np.ndarray, *, attended: int | None = None
) -> torch.Tensor:
    """Hidden states (tokens, width). Only the first ``attended`` tokens are attended to, None is all."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    bias = alibi_bias(heads, len(ids))
    bias[:, :, attended if attended is not None else len(ids) :] = -torch.inf
    words = w["embeddings.word_embeddings.weight"][torch.from_numpy(ids).long()]
    x = norm(w, "embeddings.LayerNorm", words + w["embeddings.token_type_embeddings.weight"][0], eps)
    for i in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        own = f"{name}.attention.self"
        query, key, value = (linear(w, f"{own}.{part}", x) for part in ("query", "key", "value"))
        query_norm = f"{own}.layer_norm_q.weight" in w
        if query_norm:
            query, key = norm(w, f"{own}.layer_norm_q", query, eps), norm(w, f"{own}.layer_norm_k", key, eps)
        mixed = linear(w, f"{name}.attention.output.dense", attend(query, key, value, heads, bias))
        attention = norm(w, f"{name}.attention.output.LayerNorm", mixed + x, eps)
        x = (_query_norm_end if query_norm else _standard_end)(w, name, x, attention, eps)
    return x


def _standard_end(
    w: Tensors, name: str, x: torch.Tensor, attention: torch.Tensor, eps: float
) -> torch.Tensor:
    gate, straight = (attention @ w[f"{name}.mlp.gated_layers.weight"].T).chunk(2, dim=-1)
    down = linear(w, f"{name}.mlp.wo", gelu(gate) * straight)
    return norm(w, f"{name}.mlp.layernorm", down + attention, eps)


def _query_norm_end(
    w: Tensors, name: str, x: torch.Tensor, attention: torch.Tensor, eps: float
) -> torch.Tensor:
    h = norm(w, f"{name}.layer_norm_1", x + attention, eps)
    straight, gate = (h @ w[f"{name}.mlp.up_gated_layer.weight"].T).chunk(2, dim=-1)
    down = linear(w, f"{name}.mlp.down_layer", straight * gelu(gate))
    return norm(w, f"{name}.layer_norm_2", h + down, eps)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, bias: torch.Tensor
) -> torch.Tensor:
    """Multi-head attention over (tokens, width) with ``bias`` (heads, tokens, tokens) on the scores."""
    size = query.shape[1] // heads
    parts = []
    for h in range(heads):
        columns = slice(h * size, (h + 1) * size)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(size) + bias[h]
        parts.append(scores.softmax(-1) @ value[:, columns])
    return torch.cat(parts, dim=1)


def linear(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def merged(w: Tensors, config: Mapping[str, Any], task: str | None) -> dict[str, torch.Tensor]:
    """The plain weights that one task of jina-embeddings-v3 amounts to, None being the base."""
    scale = config["lora_alpha"] / config["lora_rank"]
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in w.items():
        if name.endswith("parametrizations.weight.original"):
            owner = name.removesuffix(".parametrizations.weight.original")
            if task is not None:
                index = config["lora_adaptations"].index(task)
                a = w[f"{owner}.parametrizations.weight.0.lora_A"][index]
                b = w[f"{owner}.parametrizations.weight.0.lora_B"][index]
                tensor = tensor + scale * (a @ b if "embeddings" in owner else b @ a)
            plain[f"{owner}.weight"] = tensor
        elif "parametrizations" not in name:
            plain[name] = tensor
    return plain


@_once
def xlm_rotary(w: Tensors, config: Mapping[str, Any], ids: np.ndarray) -> torch.Tensor:
    """Hidden states (tokens, width) of an XLM-R with rotary positions, from plain weights."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    width = config["hidden_size"]
    words = w["embeddings.word_embeddings.weight"][torch.from_numpy(ids).long()]
    x = norm(w, "emb_ln", words + w["embeddings.token_type_embeddings.weight"][0], eps)
    for i in range(config["num_hidden_layers"]):
        name = f"encoder.layers.{i}"
        query, key, value = linear(w, f"{name}.mixer.Wqkv", x).split(width, dim=1)
        query = rotate(query, heads, config["rotary_emb_base"])
        key = rotate(key, heads, config["rotary_emb_base"])
        mixed = attend(query, key, value, heads, torch.zeros(heads, 1, 1, dtype=torch.float64))
        x = norm(w, f"{name}.norm1", x + linear(w, f"{name}.mixer.out_proj", mixed), eps)
        inner = gelu(linear(w, f"{name}.mlp.fc1", x))
        x = norm(w, f"{name}.norm2", x + linear(w, f"{name}.mlp.fc2", inner), eps)
    return x


def rotate(x: torch.Tensor, heads: int, base: float) -> torch.Tensor:
    """Turn pair (i, i + half) of each head by position * base^(-i / half)."""
    tokens, width = x.shape
    half = width // heads // 2
    out = torch.empty_like(x)
    angles = torch.arange(tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(half):
            a, b = h * 2 * half + i, h * 2 * half + half + i
            cos, sin = (f(angles * base ** (-i / half)) for f in (torch.cos, torch.sin))
            out[:, a] = x[:, a] * cos - x[:, b] * sin
            out[:, b] = x[:, b] * cos + x[:, a] * sin
    return out


def score(w: Tensors, dense: str, out: str, first: torch.Tensor) -> float:
    """Sigmoid of the logit that a dense layer under tanh and a linear layer make of the first token."""
    return float(torch.sigmoid(linear(w, out, torch.tanh(linear(w, dense, first)))))

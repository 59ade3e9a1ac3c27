"""Decoders of published size with random weights, and what a pass through one costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from services.core.modeling.families.decoder import decoder_shapes, linear_sizes
from services.core.modeling.families.decoder_config import EUROBERT, QWEN3, DecoderConfig, Form
from services.core.modeling.families.listwise import projector_shapes
from tests.decoder_checkpoints import MARKERS, V5_TASKS, qwen_tokenizer, write_adapter

Clock = Callable[[], float]

NANO, SMALL, RERANKER = "jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small", "jina-reranker-v3"

_QWEN3: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
}
_NANO: dict[str, Any] = {
    "model_type": "jina_embeddings_v5",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "max_position_embeddings": 8192,
}
_SMALL = {"model_type": "jina_embeddings_v5", "rope_theta": 3500000.0, "max_position_embeddings": 32768}
_RERANKER = {
    "architectures": ["JinaForRanking"],
    "model_type": "qwen3",
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
}
CONFIGS: dict[str, tuple[dict[str, Any], Form]] = {
    NANO: (_NANO, EUROBERT),
    SMALL: (_QWEN3 | _SMALL, QWEN3),
    RERANKER: (_QWEN3 | _RERANKER, QWEN3),
}


def config_of(model: str) -> DecoderConfig:
    """The numbers of ``model``."""
    return DecoderConfig.read(*CONFIGS[model])


def write(directory: Path, model: str) -> Path:
    """Write ``model`` with random weights as a published checkpoint into ``directory / model``."""
    config, folder = config_of(model), directory / model
    folder.mkdir(parents=True)
    shapes = decoder_shapes(config) | (projector_shapes(config.width, 512) if model == RERANKER else {})
    save_file({name: _random(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[model][0]))
    qwen_tokenizer(*MARKERS, ends=model == NANO).save(str(folder / "tokenizer.json"))
    for task in () if model == RERANKER else V5_TASKS:
        write_adapter(folder, task, config, rank=32, alpha=32)
    return folder


def _random(name: str, shape: Sequence[int]) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(*shape, dtype=torch.bfloat16)
    scale = 1.0 if name.startswith("embed") else shape[-1] ** -0.5
    return torch.empty(*shape, dtype=torch.bfloat16).normal_(0.0, scale)


def operations(model: str, lengths: Sequence[int]) -> float:
    """Multiplications and additions of the base network for texts of ``lengths``, attention included."""
    config = config_of(model)
    products = sum(out * into for out, into in linear_sizes(config).values())
    seen = sum(n * n / (2 if config.causal else 1) for n in lengths)
    scores = 2 * config.layers * config.heads * config.head_dim * seen
    return 2.0 * (sum(lengths) * products + scores)


def best(run: Callable[[], object], repeats: int, clock: Clock = time.perf_counter) -> float:
    """Least seconds of ``run``, which waits for its results."""
    times: list[float] = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def ceiling(model: str, device: torch.device, clock: Clock) -> float:
    """Operations per second of the bare bf16 products of one layer, at the best of some numbers of rows."""
    sizes = {shape for name, shape in linear_sizes(config_of(model)).items() if name.startswith("layers.0.")}
    rates = [
        _rate(sizes, rows, device, clock)
        for rows in ((128, 512, 2048) if device.type == "cpu" else (8192, 32768))
    ]
    return max(rates)


def _rate(sizes: set[tuple[int, int]], rows: int, device: torch.device, clock: Clock) -> float:
    seconds = work = 0.0
    for out, into in sizes:
        x = torch.randn(rows, into, device=device).bfloat16()
        weight = torch.randn(out, into, device=device).bfloat16()
        seconds += best(_product(x, weight), 30, clock)
        work += 2.0 * rows * out * into
    return work / seconds


def _product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    if x.is_cuda:

        def product() -> None:
            torch.nn.functional.linear(x, weight)
            torch.cuda.synchronize()

        return product
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

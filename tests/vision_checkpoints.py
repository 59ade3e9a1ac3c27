"""Tiny jina-embeddings-v4 and jina-reranker-m0 in the on-disk form of the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from services.core.modeling.families.decoder import linear_sizes
from services.core.modeling.families.decoder_config import QWEN2, DecoderConfig
from services.core.modeling.families.qwen_vision import VisionConfig, vision_shapes
from tests.checkpoints import Random, Tensors, write
from tests.clip_checkpoints import MEAN, STD
from tests.decoder_checkpoints import decoder_tensors, qwen_tokenizer
from tests.text_checkpoints import stored_as

V4, M0 = "jina-embeddings-v4", "jina-reranker-m0"
TASKS = ("code", "retrieval", "text-matching")
DIMENSIONS = 16
SECTIONS = [2, 1, 1]
MAX_PIXELS = 64 * 28 * 28
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def vision_tokenizer() -> Tokenizer:
    """Make a tokenizer with the tokens that stand for pictures."""
    return qwen_tokenizer(*_VISION_TOKENS)


def text_fields(**changes: Any) -> dict[str, Any]:
    """Make the fields of the decoder, flat as in older files."""
    return {
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": vision_tokenizer().get_vocab_size(),
    } | changes


def v4_config(*, vision: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-embeddings-v4: windows of 2 x 2 states, the last of three blocks whole."""
    ids = _special_ids()
    tower = {
        "depth": 3,
        "fullatt_block_indexes": [2],
        "hidden_act": "silu",
        "hidden_size": 32,
        "in_chans": 3,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
    }
    return {
        "architectures": ["JinaEmbeddingsV4Model"],
        "auto_map": {"AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model"},
        "matryoshka_dims": [8, 16, 32],
        "model_type": "qwen2_5_vl",
        "multi_vector_projector_dim": DIMENSIONS,
        "single_vector_pool_strategy": "mean",
        "task_names": ["retrieval", "text-matching", "code"],
        "vision_config": {**tower, **(vision or {})},
        **ids,
        **text_fields(),
    } | changes


def m0_config(*, vision: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-reranker-m0."""
    tower = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "in_chans": 3,
        "mlp_ratio": 2,
        "model_type": "qwen2_vl",
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["JinaVLForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaVLForRanking"},
        "model_type": "qwen2_vl",
        "vision_config": {**tower, **(vision or {})},
        **_special_ids(),
        **text_fields(),
    } | changes


def _special_ids() -> dict[str, Any]:
    ids = {name: vision_tokenizer().token_to_id(token) for name, token in _ID_FIELDS.items()}
    return {"bos_token_id": 0, "eos_token_id": 0, **ids}


_ID_FIELDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def preprocessor_config(*, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Make ``preprocessor_config.json``."""
    return {
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": STD,
        "max_pixels": max_pixels,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "temporal_patch_size": 2,
    }


def vision_tensors(config: VisionConfig, prefix: str, random: Random) -> Tensors:
    """Make the tensors of a tower."""
    tensors: Tensors = {}
    for name, shape in vision_shapes(config, prefix).items():
        if "norm" in name or "ln_q" in name:
            gain = random.normal(*shape, scale=0.2)
            tensors[name] = gain if name.endswith("bias") else 1 + gain
        elif name.endswith("bias"):
            tensors[name] = random.normal(*shape, scale=0.2)
        else:
            into = int(torch.tensor(shape[1:]).prod())
            tensors[name] = random.normal(*shape, scale=into**-0.5)
    return tensors


def write_v4(directory: Path, *, newer: bool = False, slot: str = "", **changes: Any) -> Path:
    """Write a tiny jina-embeddings-v4; ``newer`` is the layout of keys that newer files have.

    ``slot`` stands before the task in the names of adapters.
    """
    config, random = v4_config(**changes), Random(4)
    text = DecoderConfig.read({**config, "rope_scaling": None}, QWEN2)
    vision = VisionConfig.read(config["vision_config"], newer=True)
    tensors = _placed(decoder_tensors(config_plain(config), QWEN2, random=random), vision, random, newer)
    width, dimensions = text.width, config["multi_vector_projector_dim"]
    tensors["multi_vector_projector.weight"] = random.matrix(dimensions, width)
    tensors["multi_vector_projector.bias"] = random.normal(dimensions, scale=0.2)
    write(directory, config, stored_as(torch.bfloat16, tensors), vision_tokenizer())
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor_config()))
    _write_adapters(directory, {**linear_sizes(text), "multi_vector_projector": (dimensions, width)}, slot)
    return directory


def write_m0(directory: Path, *, newer: bool = False, **changes: Any) -> Path:
    """Write a tiny jina-reranker-m0, with a language model's head as the published file has."""
    config, random = m0_config(**changes), Random(7)
    vision = VisionConfig.read(config["vision_config"], newer=False)
    tensors = _placed(decoder_tensors(config_plain(config), QWEN2, random=random), vision, random, newer)
    width = config["hidden_size"]
    for name, out in (("score.0", width), ("score.2", 1)):
        tensors[f"{name}.weight"] = random.matrix(out, width)
        tensors[f"{name}.bias"] = random.normal(out, scale=0.2)
    # So that scores do not all lie near 0.
    tensors["score.2.bias"] += 2.5
    write(directory, config, stored_as(torch.bfloat16, tensors), vision_tokenizer())
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(max_pixels=10**7)))
    return directory


def config_plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the decoder without what tells of axes."""
    return {**config, "rope_scaling": None}


def write_served(directory: Path, model: str) -> Path:
    """Write what the catalogue's ``model`` loads into ``directory / model``: its width, one layer."""
    common = {"num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 32}
    if model == V4:
        wide = {"hidden_size": 2048, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        tower = {"out_hidden_size": 2048, "depth": 2, "fullatt_block_indexes": [1]}
        return write_v4(directory / model, vision=tower, multi_vector_projector_dim=128, **wide, **common)
    narrow = {"num_attention_heads": 4, "num_hidden_layers": 2}
    return write_m0(directory / model, **narrow)


def _placed(text: Tensors, vision: VisionConfig, random: Random, newer: bool) -> Tensors:
    language, tower = ("model.language_model.", "model.visual.") if newer else ("model.", "visual.")
    placed = {f"{language}{name}": tensor for name, tensor in text.items()}
    placed |= vision_tensors(vision, tower, random)
    placed["lm_head.weight"] = text["embed_tokens.weight"].clone()
    return placed


def _write_adapters(directory: Path, sizes: Mapping[str, tuple[int, int]], slot: str, rank: int = 4) -> None:
    """Write the adapters of all tasks in one directory, as peft saves several in one module."""
    folder = directory / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    for task in TASKS:
        random = Random(sum(map(ord, task)))
        for name, (out, into) in sizes.items():
            where = name if name.startswith("multi") else f"model.language_model.{name}"
            where = f"base_model.model.{where}"
            tensors[f"{where}.lora_A{slot}.{task}.weight"] = random.normal(rank, into, scale=into**-0.5)
            tensors[f"{where}.lora_B{slot}.{task}.weight"] = random.normal(out, rank, scale=0.5 * rank**-0.5)
    save_file(stored_as(torch.bfloat16, tensors), folder / "adapter_model.safetensors")
    content = {
        "alpha_pattern": {},
        "base_model_name_or_path": "jinaai/jina-embeddings-v4",
        "bias": "none",
        "exclude_modules": ".*visual.*",
        "fan_in_fan_out": False,
        "lora_alpha": rank,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": "(.*(model).*(q_proj|down_proj).*$|.*(multi_vector_projector).*$)",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))

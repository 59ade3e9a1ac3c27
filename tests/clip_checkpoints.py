"""Tiny jina-clip-v1 and -v2 in the on-disk form of the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tests.checkpoints import Random, Tensors, word_pieces, write
from tests.text_checkpoints import INSTRUCTIONS, sentence_pieces, stored_as, xlm_rotary_tensors

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
V1, V2 = "jina-clip-v1", "jina-clip-v2"
TASK = "retrieval.query"

_TEXT = {"num_hidden_layers": 2, "intermediate_size": 48}


def vision_config(model: str, **changes: Any) -> dict[str, Any]:
    """Make ``vision_config``, tiny: v2 leaves a part of a patch at the border, as 512 by 14 does."""
    own = {"image_size": 32, "patch_size": 8} if model == V1 else {"image_size": 46, "patch_size": 7}
    width = changes.get("width", 32)
    return {
        "model_type": "jina_clip_vision",
        "drop_path_rate": 0.0,
        "embed_dim": width,
        "fused_layer_norm": False,
        "head_width": 16,
        "intp_freq": model == V2,
        "layers": 2,
        "ls_init_value": None,
        "mlp_ratio": 2.6667,
        "naive_swiglu": True,
        "patch_dropout": 0.1,
        "post_norm": False,
        "proj_type": None,
        "pt_hw_seq_len": 4,
        "qkv_bias": True,
        "rope_embeddings": True,
        "subln": True,
        "width": width,
        "x_attention": True,
        **own,
    } | changes


def text_config(model: str, tokenizer: Tokenizer, width: int = 32, heads: int = 4) -> dict[str, Any]:
    """Make ``text_config``: as published it names another model and what differs from that, here the size."""
    size = {
        **_TEXT,
        "hidden_size": width,
        "num_attention_heads": heads,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    config = {
        "model_type": "jina_clip_text",
        "embed_dim": width,
        "pooler_type": "mean_pooler",
        "proj_bias": False,
        "proj_type": None,
    }
    if model == V1:
        return config | {
            "hf_model_config_kwargs": {"use_flash_attn": False, **size},
            "hf_model_name_or_path": "jinaai/jina-bert-flash-implementation",
        }
    return config | {
        "default_instruction_task": None,
        "default_lora_task": TASK,
        "hf_model_config_kwargs": {
            "load_trained_adapters": False,
            "lora_adaptations": [TASK],
            "lora_alpha": 4,
            "lora_dropout_p": 0.0,
            "lora_main_params_trainable": False,
            "lora_rank": 4,
            "task_instructions": {TASK: INSTRUCTIONS[TASK]},
            "use_flash_attn": True,
            **size,
        },
        "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
    }


def clip_config(model: str, *, width: int = 32, heads: int = 4, **vision: Any) -> dict[str, Any]:
    return {
        "add_projections": False,
        "architectures": ["JinaCLIPModel"],
        "auto_map": {"AutoModel": "jinaai/jina-clip-implementation--modeling_clip.JinaCLIPModel"},
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "matryoshka_dimensions": [8, 16, 32] if model == V2 else None,
        "model_type": "jina_clip",
        "projection_dim": width,
        "text_config": text_config(model, tokenizer_of(model), width, heads),
        "torch_dtype": "float32" if model == V1 else "float16",
        "truncate_dim": None,
        "use_text_flash_attn": None,
        "use_vision_xformers": None,
        "vision_config": vision_config(model, width=width, **vision),
    }


def preprocessor_config(size: int, **changes: Any) -> dict[str, Any]:
    return {
        "auto_map": {"AutoImageProcessor": "jinaai/jina-clip-implementation--processing_clip"},
        "fill_color": 0,
        "image_processor_type": "JinaCLIPImageProcessor",
        "interpolation": "bicubic",
        "mean": MEAN,
        "resize_mode": "shortest",
        "size": size,
        "std": STD,
    } | changes


def tokenizer_of(model: str) -> Tokenizer:
    return word_pieces() if model == V1 else sentence_pieces()


def text_tensors(model: str, config: Mapping[str, Any], random: Random) -> Tensors:
    """Make the tensors of the text tower: JinaBERT in its flash form, or XLM-R with an adapter."""
    fields = config["text_config"]["hf_model_config_kwargs"]
    if model == V2:
        tensors = xlm_rotary_tensors({"type_vocab_size": 1, **fields}, random=random)
        return {
            f"text_model.transformer.{name}": tensor
            for name, tensor in tensors.items()
            if "pooler" not in name
        }
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    tensors = {
        "embeddings.word_embeddings.weight": random.normal(fields["vocab_size"], width),
        "embeddings.token_type_embeddings.weight": random.normal(2, width, scale=0.3),
        **random.norm("emb_ln", width),
    }
    for i in range(fields["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        tensors |= random.linear(f"{layer}.mixer.Wqkv", 3 * width, width)
        tensors |= random.linear(f"{layer}.mixer.out_proj", width, width)
        tensors |= random.norm(f"{layer}.norm1", width) | random.norm(f"{layer}.norm2", width)
        tensors |= {f"{layer}.mlp.gated_layers.weight": random.matrix(2 * inner, width)}
        tensors |= random.linear(f"{layer}.mlp.wo", width, inner)
    return {f"text_model.transformer.{name}": tensor for name, tensor in tensors.items()}


def vision_tensors(config: Mapping[str, Any], random: Random) -> Tensors:
    """Make the tensors of the vision tower."""
    vision = config["vision_config"]
    width, patch = vision["width"], vision["patch_size"]
    inner = int(width * vision["mlp_ratio"])
    tokens = (vision["image_size"] // patch) ** 2 + 1
    tensors = {
        "cls_token": random.normal(1, 1, width),
        "pos_embed": random.normal(1, tokens, width, scale=0.5),
        "patch_embed.proj.weight": random.normal(width, 3, patch, patch, scale=(3 * patch * patch) ** -0.5),
        "patch_embed.proj.bias": random.normal(width, scale=0.2),
        **random.norm("norm", width),
    }
    for i in range(vision["layers"]):
        block = f"blocks.{i}"
        for part in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{block}.attn.{part}.weight"] = random.matrix(width, width)
        tensors |= {f"{block}.attn.{part}": random.normal(width, scale=0.2) for part in ("q_bias", "v_bias")}
        tensors |= random.norm(f"{block}.attn.inner_attn_ln", width)
        tensors |= random.linear(f"{block}.attn.proj", width, width)
        tensors |= random.linear(f"{block}.mlp.w1", inner, width)
        tensors |= random.linear(f"{block}.mlp.w2", inner, width)
        tensors |= random.norm(f"{block}.mlp.ffn_ln", inner)
        tensors |= random.linear(f"{block}.mlp.w3", width, inner)
        tensors |= random.norm(f"{block}.norm1", width) | random.norm(f"{block}.norm2", width)
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


def write_clip(
    directory: Path,
    model: str,
    *,
    width: int = 32,
    heads: int = 4,
    seed: int = 0,
    rope_tables: bool = False,
    preprocessor: Mapping[str, Any] | None = None,
    **vision: Any,
) -> Path:
    """Write a tiny jina-clip; ``rope_tables`` adds the buffers that some files of v1 carry."""
    config = clip_config(model, width=width, heads=heads, **vision)
    random = Random(seed)
    tensors = text_tensors(model, config, random) | vision_tensors(config, random)
    tensors["logit_scale"] = torch.tensor(2.6592)
    if rope_tables:
        tensors["vision_model.rope.freqs_cos"] = random.normal(16, 16)
        tensors["vision_model.rope.freqs_sin"] = random.normal(16, 16)
    size = config["vision_config"]["image_size"]
    return write(
        directory,
        config,
        stored_as(torch.float32 if model == V1 else torch.float16, tensors),
        tokenizer_of(model),
        files={"preprocessor_config.json": preprocessor_config(size, **(preprocessor or {}))},
    )


def write_model(models: Path, model: str) -> Path:
    """Write tiny weights that fit the catalogue's entry of ``model`` where a process looks for them."""
    if model == V1:
        return write_clip(models / model, V1, width=768, heads=12, head_width=64, layers=1)
    return write_clip(models / model, V2, width=1024, heads=16, head_width=64, layers=1)

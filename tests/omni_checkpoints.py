"""Tiny checkpoints of jina-embeddings-v5-omni in either size, in the on-disk form of the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from services.core.modeling.families.decoder_config import EUROBERT, QWEN3, DecoderConfig
from services.core.modeling.families.jina_v5_omni import OmniConfig
from services.core.modeling.families.qwen3_vision import qwen3_vision_shapes
from services.core.modeling.families.qwen_audio import audio_shapes
from tests.checkpoints import Random, Tensors, write
from tests.decoder_checkpoints import (
    V5_TASKS,
    decoder_tensors,
    nano_config,
    qwen_tokenizer,
    small_config,
    write_adapter,
)
from tests.text_checkpoints import stored_as

NANO = "jina-embeddings-v5-omni-nano"
SMALL = "jina-embeddings-v5-omni-small"
HEARD = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
SEEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
DROPPED = ("architectures", "auto_map", "model_type", "task_names", "torch_dtype")


def omni_tokenizer(size: str) -> Any:
    """The tokenizer with the marks of ``size``; nano's ends each text, as its published one does."""
    marks = ("<image>", *HEARD) if size == "nano" else (*SEEN, *HEARD)
    return qwen_tokenizer(*marks, ends=size == "nano")


def omni_config(
    size: str, towers: Mapping[str, Mapping[str, Any]] | None = None, **changes: Any
) -> dict[str, Any]:
    """Make config.json; ``changes`` are of the decoder, ``towers`` those of the configurations of towers."""
    tokenizer = omni_tokenizer(size)
    vocabulary = {"vocab_size": tokenizer.get_vocab_size()}
    text = (nano_config if size == "nano" else small_config)(**vocabulary, **changes)
    text = {name: value for name, value in text.items() if name not in DROPPED}
    if size == "small":
        del text["rope_theta"], text["rope_scaling"]
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 700_000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        }
    start, pad, end = map(tokenizer.token_to_id, HEARD)
    own: dict[str, Any]
    if size == "nano":
        image = tokenizer.token_to_id("<image>")
        own = {"image_token_index": image, "special_token_ids": [start, pad, end, image]}
    else:
        seen = dict(zip(SEEN, map(tokenizer.token_to_id, SEEN), strict=True))
        own = {
            "vision_start_token_id": seen["<|vision_start|>"],
            "vision_end_token_id": seen["<|vision_end|>"],
            "image_token_id": seen["<|image_pad|>"],
            "video_token_id": seen["<|video_pad|>"],
            "special_token_ids": [*seen.values(), start, pad, end],
        }
    config: dict[str, Any] = {
        "architectures": ["JinaEmbeddingsV5OmniModel"],
        "auto_map": {"AutoModel": "modeling_jina_embeddings_v5_omni.JinaEmbeddingsV5OmniModel"},
        "model_type": "jina_embeddings_v5_omni",
        "modality": "omni",
        "task_names": list(V5_TASKS),
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "intermediate_size": 24,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "out_hidden_size": 32,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 24,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 32,
            "encoder_layers": 2,
            "max_source_positions": 1500,
            "n_window": 100,
            "num_mel_bins": 128,
            "output_dim": 40,
            "scale_embedding": False,
        },
        "audio_token_id": pad,
        "audio_start_token_id": start,
        "audio_end_token_id": end,
        **own,
    }
    for name, fields in (towers or {}).items():
        config[name] |= fields
    return config


def omni_tensors(size: str, config: dict[str, Any], random: Random | None = None) -> Tensors:
    """Make all tensors, by their published names."""
    random = random or Random()
    parsed = OmniConfig.read(config)
    form = EUROBERT if size == "nano" else QWEN3
    text = {**config["text_config"], "rope_parameters": None, "rope_theta": 1.0}
    tensors = {
        f"language_model.{name}": tensor
        for name, tensor in decoder_tensors(text, form, random=random).items()
    }
    shapes = {
        **qwen3_vision_shapes(parsed.vision, "vision_tower." if size == "nano" else "visual."),
        **audio_shapes(parsed.audio, "audio_tower."),
        **parsed.bridge_shapes(),
    }
    for name, shape in shapes.items():
        if "norm" in name or "ln_post" in name:
            tensors[name] = (1.0 if name.endswith("weight") else 0.0) + random.normal(*shape, scale=0.2)
        elif name.endswith("bias"):
            tensors[name] = random.normal(*shape, scale=0.2)
        elif "pos_embed" in name or "task_token" in name:
            tensors[name] = random.normal(*shape)
        else:
            into = torch.Size(shape[1:]).numel()
            tensors[name] = random.normal(*shape, scale=into**-0.5)
    tensors["audio_tower.audio_bos_eos_token.weight"] = random.normal(2, 40)
    return tensors


def write_omni(
    directory: Path, size: str, towers: Mapping[str, Mapping[str, Any]] | None = None, **changes: Any
) -> Path:
    """Write a checkpoint with its four tasks, tiny unless changes say otherwise."""
    config = omni_config(size, towers, **changes)
    write(directory, config, stored_as(torch.bfloat16, omni_tensors(size, config)), omni_tokenizer(size))
    pictures = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures))
    form = EUROBERT if size == "nano" else QWEN3
    text = DecoderConfig.read({**config["text_config"], "rope_parameters": None, "rope_theta": 1.0}, form)
    for task in V5_TASKS:
        write_adapter(directory, task, text, prefix="base_model.model.language_model.")
    return directory


def write_text_of(source: Path, target: Path) -> Path:
    """Write the decoder of the checkpoint ``source`` to ``target``, as a jina-embeddings-v5-text."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    text = dict(config["text_config"])
    if "rope_parameters" in text:
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    (target / "config.json").write_text(json.dumps({**text, "model_type": "jina_embeddings_v5"}))
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (target / "adapters").symlink_to(source / "adapters")
    prefix = "language_model."
    tensors = load_file(source / "model.safetensors")
    own = {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
    save_file(own, target / "model.safetensors")
    return target


def write_served(folder: Path, model: str) -> Path:
    """Write what the catalogue's ``model`` loads into ``folder / model``: its width, one layer."""
    size = model.rsplit("-", 1)[1]
    return write_omni(
        folder / model,
        size,
        hidden_size=768 if size == "nano" else 1024,
        intermediate_size=64,
        max_position_embeddings=8192 if size == "nano" else 32768,
        num_attention_heads=8,
        num_hidden_layers=1,
        max_window_layers=1,
    )

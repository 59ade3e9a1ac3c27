"""Tiny jina-vlms in the form of the published one: random ones, and one that says what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from services.core.modeling.checkpoints.tokenizer import letters_of_bytes
from tests.checkpoints import Random, Tensors, write
from tests.decoder_checkpoints import END, qwen_tokenizer
from tests.text_checkpoints import stored_as

MARKS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first or always_start_with_space %}{{ ' ' }}{% endif %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role | capitalize }}:"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ image_prompt_token }}{% else %}{{ ' ' + part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)
"""In the style of the models that it stems from; the published text is read, not known."""

_RMS = {"type": "rms", "with_affine": True, "eps": 1e-6, "bias": None}
_LAYER = {"type": "default", "with_affine": True, "eps": 1e-6, "bias": True}
_GATED = {"activation_type": "silu", "gated_activation": True, "bias": False}
_PLAIN = {"activation_type": "gelu_pytorch_tanh", "gated_activation": False, "bias": True}
_MORE = 16


def vlm_tokenizer() -> Tokenizer:
    return qwen_tokenizer(*MARKS)


def base_size(tokenizer: Tokenizer) -> int:
    """Ids that an answer may hold: all before the marks of pictures."""
    return min(_id(tokenizer, mark) for mark in MARKS)


def vlm_config(tokenizer: Tokenizer, **text: Any) -> dict[str, Any]:
    attention = {
        "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "q_lnorm": True, "k_lnorm": True,
        "qkv_lnorm_on_heads": True, "lnorm_config": _RMS,
    }  # fmt: skip
    vision_attention = {"n_heads": 4, "q_bias": True, "k_bias": True, "v_bias": True, "o_bias": True}
    width = text.get("hidden_size", 32)
    return {
        "architectures": ["JinaVLMForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_jvlm.JinaVLMConfig"},
        "bos_token_id": tokenizer.token_to_id(END),
        "model_type": "jvlm",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "text_config": {
            "additional_vocab_size": _MORE,
            "block_config": {
                "attn_config": attention,
                "ffn_config": {"size": 48, **_GATED},
                "lnorm_config": _RMS,
                "postnorm": False,
            },
            "embedding_size": base_size(tokenizer),
            "hidden_size": width,
            "max_sequence_length": 4096,
            "model_type": "jvlm",
            "n_layers": 2,
            "normalize_input_embeds": False,
            "rope": True,
            "rope_theta": 10000.0,
            "vocab_size": base_size(tokenizer),
            **text,
        },
        "vision_config": {
            "block_config": {
                "attn_config": vision_attention,
                "ffn_config": {"size": 24, **_PLAIN},
                "lnorm_config": _LAYER,
            },
            "hidden_size": 16,
            "input_size": [28, 28],
            "linear_patch_embedding": True,
            "model_type": "jvlm",
            "n_channels": 3,
            "n_layers": 4,
            "output_size": width,
            "patch_size": 4,
            "post_lnorm": True,
            "use_cls_token": False,
            "vit_layers": [-2, -4],
            "vl_connector_config": {
                "attn_pooling_config": vision_attention,
                "mlp_projector_config": {"size": 40, **_GATED},
                "padding_embed_type": "pad_and_partial_pad",
                "pooling_h": 2,
                "pooling_w": 2,
                "pooling_type": "attention_meanq",
                "projector_type": "mlp",
            },
        },
    }  # fmt: skip


def preprocessor_config(**changes: Any) -> dict[str, Any]:
    """Make the file as released: 8 bits, bilinear, without smoothing."""
    return {
        "antialias": False,
        "base_input_size": [28, 28],
        "cropping_method": "overlap-and-resize",
        "do_resize": True,
        "image_max": 1.0,
        "image_min": -1.0,
        "image_processor_type": "JinaVLMImageProcessor",
        "interpolation": "bilinear",
        "max_crops": 6,
        "max_pixels": 64 * 64,
        "min_pixels": 8 * 8,
        "normalization_method": "minmax",
        "overlap_margins": [2, 2],
        "patch_size": 4,
        "pooling_h": 2,
        "pooling_w": 2,
        "resize_in_float32": False,
        "token_length_h": 4,
        "token_length_w": 4,
        "use_column_tokens": True,
    } | changes


def vlm_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    random = Random(seed)
    text, vision = config["text_config"], config["vision_config"]
    width, block = text["hidden_size"], text["block_config"]
    attention, inner = block["attn_config"], block["ffn_config"]["size"]
    queries, keys = (attention[name] * attention["head_dim"] for name in ("n_heads", "n_kv_heads"))

    def gain(size: int) -> torch.Tensor:
        return 1 + random.normal(size, scale=0.2)

    tensors: Tensors = {
        "model.language_model.embedding.embedding": random.normal(text["embedding_size"], width),
        "model.language_model.embedding.new_embedding": random.normal(text["additional_vocab_size"], width),
        "model.language_model.ln_f.weight": gain(width),
        "lm_head.weight": random.matrix(text["embedding_size"], width),
    }
    for i in range(text["n_layers"]):
        name = f"model.language_model.layers.{i}"
        tensors |= {
            f"{name}.attn_lnorm.weight": gain(width),
            f"{name}.ffn_lnorm.weight": gain(width),
            f"{name}.attn.qkv_w.weight": random.matrix(queries + 2 * keys, width),
            f"{name}.attn.out.weight": random.matrix(width, queries),
            f"{name}.attn.q_lnorm.weight": gain(attention["head_dim"]),
            f"{name}.attn.k_lnorm.weight": gain(attention["head_dim"]),
            f"{name}.attn.q_b": torch.zeros(queries),
            f"{name}.attn.k_b": torch.zeros(keys),
            f"{name}.attn.v_b": torch.zeros(keys),
            f"{name}.ffn.up.weight": random.matrix(2 * inner, width),
            f"{name}.ffn.down.weight": random.matrix(width, inner),
        }
    wide, patch = vision["hidden_size"], vision["patch_size"]
    name = "model.vision_model"
    tensors |= random.linear(f"{name}.patch_embed.proj", wide, 3 * patch**2)
    tensors |= {f"{name}.pos_embed": random.normal((vision["input_size"][0] // patch) ** 2, wide)}
    tensors |= random.norm(f"{name}.post_lnorm", wide)
    for i in range(vision["n_layers"]):
        layer = f"{name}.layers.{i}"
        tensors |= random.norm(f"{layer}.attn_lnorm", wide) | random.norm(f"{layer}.ffn_lnorm", wide)
        tensors |= {f"{layer}.attn.qkv_w.weight": random.matrix(3 * wide, wide)}
        tensors |= {f"{layer}.attn.{part}_b": random.normal(wide, scale=0.2) for part in "qkv"}
        tensors |= random.linear(f"{layer}.attn.out", wide, wide)
        hidden = vision["block_config"]["ffn_config"]["size"]
        tensors |= random.linear(f"{layer}.ffn.up", hidden, wide) | random.linear(
            f"{layer}.ffn.down", wide, hidden
        )
    name, joined = f"{name}.vl_connector", wide * len(vision["vit_layers"])
    size = vision["vl_connector_config"]["mlp_projector_config"]["size"]
    return tensors | {
        f"{name}.pad_embed": random.normal(2, joined),
        f"{name}.pooling.q_w.weight": random.matrix(wide, joined),
        f"{name}.pooling.kv_w.weight": random.matrix(2 * wide, joined),
        **{f"{name}.pooling.{part}_b": random.normal(wide, scale=0.2) for part in "qkv"},
        **random.linear(f"{name}.pooling.out", wide, wide),
        f"{name}.projector.up.weight": random.matrix(2 * size, wide),
        f"{name}.projector.down.weight": random.matrix(width, size),
    }


def write_vlm(directory: Path, *, seed: int = 0, preprocessor: Mapping[str, Any] | None = None) -> Path:
    """Write one with random weights."""
    tokenizer = vlm_tokenizer()
    config = vlm_config(tokenizer)
    return _write(directory, config, vlm_tensors(config, seed), tokenizer, preprocessor or {})


def write_parrot(directory: Path, text: str, *, then: str | None = None, positions: int = 4096) -> Path:
    """Write one that answers ``text`` byte by byte, to end there or to say ``then`` for ever.

    Each token has one successor, so no byte may stand in ``text`` twice, nor in ``then``. What comes before
    an answer has no part in it: whichever token a prompt ends with is followed by the first byte.
    """
    tokenizer = vlm_tokenizer()
    count = base_size(tokenizer)
    config = vlm_config(tokenizer, hidden_size=2 * count, max_sequence_length=positions)
    tensors = vlm_tensors(config)
    said = [*_byte_ids(tokenizer, text), *_byte_ids(tokenizer, then or "")]
    assert len(set(said)) == len(said)
    follows = dict.fromkeys(range(count), said[0])
    follows |= dict(pairwise(said))
    follows[said[-1]] = said[len(text.encode())] if then else _id(tokenizer, END)
    words = torch.zeros(count, 2 * count)
    words[:, :count] = torch.eye(count)
    head = torch.zeros(count, 2 * count)
    for token, next_token in follows.items():
        head[next_token, token] = 1.0
    tensors["model.language_model.embedding.embedding"] = words
    tensors["model.language_model.ln_f.weight"] = torch.ones(2 * count)
    tensors["lm_head.weight"] = head
    for name, tensor in tensors.items():
        if name.startswith("model.language_model.layers") and name.endswith(("out.weight", "down.weight")):
            tensors[name] = torch.zeros_like(tensor)
    return _write(directory, config, tensors, tokenizer, {})


def _byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    letters = {byte: letter for letter, byte in letters_of_bytes().items()}
    return [_id(tokenizer, letters[byte]) for byte in text.encode()]


def _id(tokenizer: Tokenizer, token: str) -> int:
    id = tokenizer.token_to_id(token)
    assert id is not None
    return id


def _write(
    directory: Path,
    config: dict[str, Any],
    tensors: Tensors,
    tokenizer: Tokenizer,
    changes: Mapping[str, Any],
) -> Path:
    files = {
        "preprocessor_config.json": preprocessor_config(**changes),
        "processor_config.json": {"always_start_with_space": True, "processor_class": "JinaVLMProcessor"},
        "tokenizer_config.json": {"bos_token": None, "eos_token": END, "model_max_length": 4096},
        "generation_config.json": {"eos_token_id": [tokenizer.token_to_id(END)]},
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    return write(directory, config, stored_as(torch.bfloat16, tensors), tokenizer, files=files)

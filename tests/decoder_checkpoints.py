"""Tiny checkpoints of the decoder-based families, in the on-disk form of the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from services.core.modeling.families.decoder import linear_sizes
from services.core.modeling.families.decoder_config import EUROBERT, QWEN2, QWEN3, DecoderConfig, Form
from tests.checkpoints import Random, Tensors, write
from tests.text_checkpoints import BYTE_PAIR_MERGES, stored_as

V5_TASKS = ("retrieval", "text-matching", "clustering", "classification")
MARKERS = ("<|embed_token|>", "<|rerank_token|>")
END = "<|endoftext|>"


def qwen_tokenizer(*added: str, ends: bool = False) -> Tokenizer:
    """Make a byte-level BPE tokenizer as Qwen's; with ``ends`` it appends the end token, as nano's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*alphabet, *(a + b for a, b in BYTE_PAIR_MERGES)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(BYTE_PAIR_MERGES)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, "<|im_start|>", "<|im_end|>", *added])
    plain = processors.ByteLevel(trim_offsets=False)
    if ends:
        id = tokenizer.token_to_id(END)
        end = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, id)])
        tokenizer.post_processor = processors.Sequence([plain, end])
    else:
        tokenizer.post_processor = plain
    return tokenizer


def decoder_tensors(config: Mapping[str, Any], form: Form, *, random: Random | None = None) -> Tensors:
    """Make the tensors of a bare network, names without a prefix."""
    random = random or Random()
    parsed = DecoderConfig.read(config, form)

    def gain(width: int) -> torch.Tensor:
        return 1 + random.normal(width, scale=0.2)

    tensors = {"embed_tokens.weight": random.normal(parsed.vocabulary, parsed.width)}
    for i in range(parsed.layers):
        name = f"layers.{i}"
        tensors[f"{name}.input_layernorm.weight"] = gain(parsed.width)
        tensors[f"{name}.post_attention_layernorm.weight"] = gain(parsed.width)
        if form.head_norms:
            tensors[f"{name}.self_attn.q_norm.weight"] = gain(parsed.head_dim)
            tensors[f"{name}.self_attn.k_norm.weight"] = gain(parsed.head_dim)
    for name, (out, into) in linear_sizes(parsed).items():
        tensors[f"{name}.weight"] = random.matrix(out, into)
        if form.attention_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{name}.bias"] = random.normal(out, scale=0.2)
    return tensors | {"norm.weight": gain(parsed.width)}


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": qwen_tokenizer(*MARKERS).get_vocab_size(),
    } | changes


_V5 = {
    "architectures": ["JinaEmbeddingsV5Model"],
    "auto_map": {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"},
    "model_type": "jina_embeddings_v5",
    "task_names": list(V5_TASKS),
}


def nano_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-embeddings-v5-text-nano, tiny unless ``changes`` say otherwise."""
    own = {
        "attention_bias": False,
        "bos_token_id": 0,
        "head_dim": 8,
        "is_decoder": False,
        "mlp_bias": False,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000.0,
    }
    return _config(**(_V5 | own | changes))


def small_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-embeddings-v5-text-small."""
    return _config(**(_V5 | qwen3_fields() | {"is_decoder": True} | changes))


def qwen3_fields() -> dict[str, Any]:
    """What Qwen3 adds; heads are wider than their share of the width, as in the published sizes."""
    return {
        "attention_bias": False,
        "head_dim": 16,
        "max_window_layers": 2,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def code_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-code-embeddings-*."""
    own = {
        "architectures": ["Qwen2Model"],
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    return _config(**(own | changes))


def ranker_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-reranker-v3."""
    own = {"architectures": ["JinaForRanking"], "model_type": "qwen3", "max_position_embeddings": 131072}
    return _config(**(qwen3_fields() | own | changes))


def write_adapter(
    directory: Path,
    task: str,
    config: DecoderConfig,
    *,
    rank: int = 4,
    alpha: int = 8,
    random: Random | None = None,
    prefix: str = "base_model.model.",
    slot: str = "",
    modules: Sequence[str] | None = None,
) -> None:
    """Write ``adapters/<task>`` as peft does; ``modules`` are the last names of the layers, None all."""
    random = random or Random(sum(map(ord, task)))
    folder = directory / "adapters" / task
    folder.mkdir(parents=True, exist_ok=True)
    names = {name.rsplit(".", 1)[1] for name in linear_sizes(config)}
    targets = sorted(names if modules is None else modules)
    tensors: Tensors = {}
    for name, (out, into) in linear_sizes(config).items():
        if name.rsplit(".", 1)[1] in targets:
            tensors[f"{prefix}{name}.lora_A{slot}.weight"] = random.normal(rank, into, scale=into**-0.5)
            tensors[f"{prefix}{name}.lora_B{slot}.weight"] = random.normal(out, rank, scale=0.5 * rank**-0.5)
    save_file(stored_as(torch.bfloat16, tensors), folder / "adapter_model.safetensors")
    content = {
        "alpha_pattern": {},
        "base_model_name_or_path": "jinaai/jina-embeddings-v5-text",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))


def write_v5(
    directory: Path, size: str, *, random: Random | None = None, prefix: str = "", **changes: Any
) -> Path:
    """Write a tiny jina-embeddings-v5-text-``size`` with its four adapters."""
    nano = size == "nano"
    config, form = (nano_config(**changes), EUROBERT) if nano else (small_config(**changes), QWEN3)
    tensors = stored_as(torch.bfloat16, decoder_tensors(config, form, random=random))
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    write(directory, config, tensors, qwen_tokenizer(*MARKERS, ends=nano))
    for task in V5_TASKS:
        write_adapter(directory, task, DecoderConfig.read(config, form))
    return directory


def write_code(directory: Path, *, random: Random | None = None, **changes: Any) -> Path:
    """Write a tiny jina-code-embeddings-*, saved from a language model."""
    config = code_config(**changes)
    tensors = stored_as(torch.bfloat16, decoder_tensors(config, QWEN2, random=random))
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return write(directory, config, tensors, qwen_tokenizer(*MARKERS))


def write_ranker(
    directory: Path, *, dimensions: int = 512, random: Random | None = None, **changes: Any
) -> Path:
    """Write a tiny jina-reranker-v3, with a language model's head as some files have it."""
    random = random or Random()
    config = ranker_config(**changes)
    tensors = {
        f"model.{name}": tensor for name, tensor in decoder_tensors(config, QWEN3, random=random).items()
    }
    width = config["hidden_size"]
    tensors["projector.0.weight"] = random.matrix(width // 2, width)
    tensors["projector.2.weight"] = random.matrix(dimensions, width // 2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return write(directory, config, stored_as(torch.bfloat16, tensors), qwen_tokenizer(*MARKERS))


def write_served(directory: Path, model: str) -> Path:
    """Write what the catalogue's ``model`` loads into ``directory / model``: its width, one layer."""
    folder = directory / model
    common = {"num_hidden_layers": 1, "max_window_layers": 1, "intermediate_size": 64}
    if model.startswith("jina-embeddings-v5-text"):
        size = model.rsplit("-", 1)[1]
        own = {"hidden_size": 768 if size == "nano" else 1024, "num_attention_heads": 8}
        positions = 8192 if size == "nano" else 32768
        return write_v5(folder, size, max_position_embeddings=positions, **common | own)
    if model.startswith("jina-code"):
        own = {"hidden_size": 896 if model.endswith("0.5b") else 1536, "num_attention_heads": 8}
        return write_code(folder, max_position_embeddings=32768, **common | own)
    return write_ranker(folder, **common)

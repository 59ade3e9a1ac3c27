"""Checkpoints of sparse encoders in other forms, made into the one that is served.

ELSER comes as a TorchScript archive of Elastic's own runner, older SPLADE models as a pickled state. Both are
a BERT with the head of a masked language model under names of their own; sizes are read off the tensors.
Nothing but tensors is taken from either.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import BertWordPieceTokenizer

from services.core.modeling.checkpoints.checkpoint import CheckpointError

_WORDS = "embeddings.word_embeddings.weight"
_TRANSFORM = "predictions.transform.dense.weight"
_BIAS, _TIED_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
_NOT_WEIGHTS = ("position_ids", "token_type_ids")
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_HEAD_WIDTH = 64


def convert_sparse(source: Path, vocabulary: Path, target: Path, *, heads: int | None = None) -> None:
    """Write the sparse encoder in ``source`` into the folder ``target``, which must not be there.

    ``source`` is a TorchScript archive or a pickled state of tensors, ``vocabulary`` a ``vocab.txt`` or a
    JSON file with a list of tokens. ``heads`` defaults to one for each 64 of the width. CheckpointError if
    these are not what they should be.
    """
    if target.exists():
        raise CheckpointError(f"{target} is there already")
    tensors = _renamed(source, _read(source))
    tokens = _tokens(vocabulary)
    config = _config(source, tensors, heads)
    if len(tokens) != config["vocab_size"]:
        raise CheckpointError(f"{vocabulary}: {len(tokens)} tokens, the network has {config['vocab_size']}")
    tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save(str(target / "tokenizer.json"))
    save_file(tensors, target / "model.safetensors")


def _read(source: Path) -> Mapping[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(source, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):
        pass  # no TorchScript archive; it may be a pickled state
    try:
        state: Any = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{source}: neither a TorchScript archive nor a state of tensors") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{source}: it holds other things than tensors")
    return cast("dict[str, torch.Tensor]", state)


def _renamed(source: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the names of ``BertForMaskedLM`` in place of those with the wrappers' prefixes."""
    body = _prefix(source, state, _WORDS)
    head = _prefix(source, state, _TRANSFORM)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        if name.startswith(head + "predictions."):
            tensors["cls." + name.removeprefix(head)] = tensor.clone().contiguous()
        elif name.startswith((body + "embeddings.", body + "encoder.")):
            tensors["bert." + name.removeprefix(body)] = tensor.clone().contiguous()
        elif not name.startswith(body + "pooler."):
            raise CheckpointError(f"{source}: it is not known what the tensor '{name}' is")
    if _BIAS not in tensors and _TIED_BIAS in tensors:
        tensors[_BIAS] = tensors.pop(_TIED_BIAS)
    return tensors


def _prefix(source: Path, state: Mapping[str, torch.Tensor], ending: str) -> str:
    found = [name.removesuffix(ending) for name in state if name.endswith(ending)]
    if len(found) != 1:
        raise CheckpointError(
            f"{source}: {len(found)} tensors named '...{ending}', where one is needed. Quantised builds have "
            "none: take the portable one"
        )
    return found[0]


def _tokens(vocabulary: Path) -> list[str]:
    try:
        text = vocabulary.read_text("utf-8")
        value: Any = json.loads(text) if vocabulary.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{vocabulary}: cannot be read: {error}") from error
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("vocabulary")
    if not isinstance(value, list) or not all(isinstance(token, str) for token in cast("list[Any]", value)):
        raise CheckpointError(f"{vocabulary}: it holds no list of tokens")
    tokens = cast("list[str]", value)
    if lacking := [token for token in _SPECIALS if token not in tokens]:
        raise CheckpointError(f"{vocabulary}: no tokens {', '.join(lacking)}")
    return tokens


def _config(source: Path, tensors: Mapping[str, torch.Tensor], heads: int | None) -> dict[str, Any]:
    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(f"{source}: no tensor '{name}'")
        return tensors[name].shape

    vocabulary, width = shape(f"bert.{_WORDS}")
    layers = {name.split(".")[3] for name in tensors if name.startswith("bert.encoder.layer.")}
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": shape("bert.encoder.layer.0.intermediate.dense.weight")[0],
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": shape("bert.embeddings.position_embeddings.weight")[0],
        "num_attention_heads": heads or max(1, width // _HEAD_WIDTH),
        "num_hidden_layers": len(layers),
        "position_embedding_type": "absolute",
        "type_vocab_size": shape("bert.embeddings.token_type_embeddings.weight")[0],
        "vocab_size": vocabulary,
    }

"""A checkpoint that is not whole, or of another network, is refused in words; for every text family."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.catalog import Catalog
from services.core.modeling.checkpoint import CheckpointError
from services.core.modeling.registry import load_network
from tests.modeling.support import config_of
from tests.text_checkpoints import write_model

MODELS = (
    "jina-embeddings-v2-base-en",
    "jina-embeddings-v2-base-code",
    "jina-embeddings-v3",
    "jina-colbert-v1-en",
    "jina-colbert-v2",
    "elser-v2",
    "jina-reranker-v1-tiny-en",
    "jina-reranker-v2-base-multilingual",
)

Tensors = dict[str, torch.Tensor]


def load(folder: Path, model: str) -> None:
    load_network(Catalog.load().require(model), folder, device=torch.device("cpu"), dtype=torch.float32)


def refused(folder: Path, model: str, change: Callable[[Tensors], object], reason: str) -> None:
    path = folder / "model.safetensors"
    whole = load_file(path)
    tensors = dict(whole)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=reason):
        load(folder, model)
    save_file(whole, path)


def middle(folder: Path) -> str:
    """A weight matrix in the middle of the network."""
    names = sorted(load_file(folder / "model.safetensors"))
    return next(name for name in names if "layer" in name and name.endswith(("dense.weight", "original")))


def plain(name: str) -> str:
    return re.escape(name.removeprefix("bert.").removeprefix("roberta."))


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_that_is_not_whole(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    load(folder, model)
    name = middle(folder) if "v2-base-multi" not in model and "colbert-v2" not in model else _wqkv(folder)
    refused(folder, model, lambda t: t.pop(name), f"missing tensors: {plain(name)}")
    refused(folder, model, lambda t: t.update(odd=torch.ones(1)), "does not know: odd")
    refused(folder, model, lambda t: t.update({name: t[name][:-1].clone()}), f"wrong kind: {plain(name)} is")
    refused(folder, model, lambda t: t.update({name: t[name].to(torch.int8)}), f"{plain(name)} holds I8")


def _wqkv(folder: Path) -> str:
    return next(name for name in load_file(folder / "model.safetensors") if name.endswith("Wqkv.weight"))


@pytest.mark.parametrize("model", MODELS)
def test_a_file_cut_short(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 7)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "foreign",
    [
        {"model_type": "qwen3", "position_embedding_type": None, "architectures": ["Qwen3ForCausalLM"]},
        {"position_embedding_type": "relative_key"},
    ],
)
def test_the_configuration_of_another_network(tmp_path: Path, model: str, foreign: dict[str, object]) -> None:
    folder = write_model(tmp_path, model)
    (folder / "config.json").write_text(json.dumps(config_of(folder) | foreign))
    with pytest.raises(CheckpointError, match=f"{re.escape(model)} is a '.*' model, but it"):
        load(folder, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size", "layer_norm_eps"])
def test_a_configuration_that_lacks_a_number(tmp_path: Path, model: str, field: str) -> None:
    folder = write_model(tmp_path, model)
    config = config_of(folder)
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{field}' must be"):
        load(folder, model)


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_with_more_ids_than_the_network(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {"id": 999, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(added | {"normalized": False, "special": True})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"has \d+ ids, the network \d+"):
        load(folder, model)

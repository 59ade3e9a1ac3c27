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
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.registry import load_network
from tests.modeling.support import config_of
from tests.text_checkpoints import FAMILIES, write_model

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


@pytest.mark.parametrize("model", FAMILIES)
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


@pytest.mark.parametrize("model", FAMILIES)
def test_a_file_cut_short(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 7)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder, model)


@pytest.mark.parametrize("model", FAMILIES)
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


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size", "layer_norm_eps"])
def test_a_configuration_that_lacks_a_number(tmp_path: Path, model: str, field: str) -> None:
    folder = write_model(tmp_path, model)
    config = config_of(folder)
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{field}' must be"):
        load(folder, model)


@pytest.mark.parametrize("model", FAMILIES)
def test_a_tokenizer_with_more_ids_than_the_network(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {"id": 999, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(added | {"normalized": False, "special": True})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"has \d+ ids, the network \d+"):
        load(folder, model)


@pytest.mark.parametrize("model", FAMILIES)
def test_weights_that_are_a_pickle_only(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    load(folder, model)  # beside safetensors it is left alone
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"no model\.safetensors; pytorch_model\.bin is not read: a pickle"
    ):
        load(folder, model)


@pytest.mark.parametrize("model", FAMILIES)
def test_shards_and_one_that_is_not_there(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    in_shards(folder)
    load(folder, model)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json: it names model-00002-of-00002\.safetensors, which"
    ):
        load(folder, model)


@pytest.mark.parametrize("model", FAMILIES)
def test_a_tensor_in_two_shards(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    name = in_shards(folder)
    second = folder / "model-00002-of-00002.safetensors"
    again = load_file(folder / "model-00001-of-00002.safetensors")[name]
    save_file(load_file(second) | {name: again}, second)
    with pytest.raises(
        CheckpointError, match=f"'{re.escape(name)}' is in model-00001-of-00002.safetensors too"
    ):
        load(folder, model)


@pytest.mark.parametrize("model", [name for name in FAMILIES if not name.startswith("jina-embeddings-v2")])
def test_a_tensor_with_and_without_the_prefix(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path, model)
    name = next(n for n in load_file(folder / "model.safetensors") if n.startswith(("bert.", "roberta.")))
    bare = name.partition(".")[2]
    refused(
        folder,
        model,
        lambda t: t.update({bare: t[name].clone()}),
        f"with and without '.*': {re.escape(bare)}",
    )


@pytest.mark.parametrize("model", FAMILIES)
def test_code_beside_the_weights_is_never_run(tmp_path: Path, model: str) -> None:
    """Of a configuration that names code, as the published ones do, the code stays a file."""
    folder = write_model(tmp_path, model)
    ran = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Model: pass\n")
    named = {"auto_map": {"AutoModel": "modeling.Model", "AutoTokenizer": ["modeling.Model", None]}}
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | named))
    if model == "elser-v2":  # a stock BERT needs no code: one that names some is of another network
        with pytest.raises(CheckpointError, match="is of no network served here"):
            load(folder, model)
    else:
        load(folder, model)
    assert not ran.exists()


def in_shards(folder: Path) -> str:
    """Spread the weights over two files and an index; return the name of a tensor of the first."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names[0]

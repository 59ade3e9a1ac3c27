"""A checkpoint is served whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError
from services.core.modeling.registry import load_text_encoder
from tests.checkpoints import bert_config, spec, write_bert


def load(directory: Path, **changes: Any) -> None:
    load_text_encoder(spec(**changes), directory, device=torch.device("cpu"), dtype=torch.float32)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_bert(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(CheckpointError, match=r"missing tensors: encoder\.layer\.1\.output\.dense\.bias$"):
        load(tmp_path)


def test_a_left_over_tensor_is_named(tmp_path: Path) -> None:
    write_bert(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"encoder.layer.2.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"does not know: encoder\.layer\.2\.extra$"):
        load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    write_bert(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(31)}))
    with pytest.raises(CheckpointError, match=r"embeddings\.LayerNorm\.bias is \[31\] and should be \[32\]"):
        load(tmp_path)


def test_a_tensor_that_holds_no_floats_is_named(tmp_path: Path) -> None:
    write_bert(tmp_path)
    change_tensors(
        tmp_path, lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(32, dtype=torch.int8)})
    )
    with pytest.raises(CheckpointError, match=r"embeddings\.LayerNorm\.bias holds I8"):
        load(tmp_path)


def test_all_faults_are_told_at_once_and_long_lists_cut(tmp_path: Path) -> None:
    write_bert(tmp_path, num_hidden_layers=3)
    change_json(tmp_path / "config.json", num_hidden_layers=2, max_position_embeddings=65)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "encoder.layer.2.attention.output.LayerNorm.bias" in message
    assert "and 8 more" in message
    assert "embeddings.position_embeddings.weight is [64, 32] and should be [65, 32]" in message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load(tmp_path)


def test_other_weight_formats_are_not_read(tmp_path: Path) -> None:
    write_bert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "is not JSON"), ("[]", "is not a JSON object"), ("\xff", "is not JSON")]
)
def test_a_broken_config_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    write_bert(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"config\.json: {reason}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_bert(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "roberta"},
        {"position_embedding_type": "alibi", "feed_forward_type": "geglu"},
        {"feed_forward_type": "geglu"},
        {"auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}},
    ],
)
def test_a_foreign_network_is_refused_even_if_it_says_bert(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_bert(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="tiny is a 'bert' model, but it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
        ({"is_decoder": True}, "'is_decoder' is True"),
        ({"num_attention_heads": 5}, "5 heads do not divide a width of 32"),
        ({"hidden_size": "32"}, "'hidden_size' must be a int, found '32'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be a int"),
        ({"layer_norm_eps": None}, "'layer_norm_eps' must be a float"),
    ],
)
def test_a_config_the_network_does_not_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_bert(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def test_a_family_without_a_network_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    with pytest.raises(CheckpointError, match="no network 'unheard_of'"):
        load(tmp_path, family="unheard_of")


def test_what_the_catalogue_promises_must_hold(tmp_path: Path) -> None:
    write_bert(tmp_path)
    with pytest.raises(CheckpointError, match="vectors of 32 numbers, tiny has 384"):
        load(tmp_path, dimensions=384)
    with pytest.raises(CheckpointError, match="to take 65 tokens, the network has 64 positions"):
        load(tmp_path, context_length=65)


def test_a_tokenizer_with_more_ids_than_the_network_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path, vocab_size=18)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 19 ids, the network 18"):
        load(tmp_path)


def test_a_pooling_that_is_not_served_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path, pooling="max_tokens")
    with pytest.raises(CheckpointError, match="pooling_mode_max_tokens"):
        load(tmp_path)


def test_a_prefix_is_stripped(tmp_path: Path) -> None:
    write_bert(tmp_path)
    tensors = {f"bert.{name}": t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | {"cls.predictions.bias": torch.zeros(19)}, tmp_path / "model.safetensors")
    load(tmp_path)


def split(directory: Path, *, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    parts = {names[0]: half, names[1]: [n for n in tensors if n not in half]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, directory / Path(file).name)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read(tmp_path: Path) -> None:
    write_bert(tmp_path)
    split(tmp_path)
    load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_bert(tmp_path)
    split(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load(tmp_path)


def test_a_shard_outside_the_directory_is_not_opened(tmp_path: Path) -> None:
    write_bert(tmp_path / "model")
    split(tmp_path / "model", names=("a.safetensors", "../b.safetensors"))
    with pytest.raises(CheckpointError, match="outside the directory"):
        load(tmp_path / "model")


def test_a_tensor_is_read_in_the_asked_dtype(tmp_path: Path) -> None:
    write_bert(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config["hidden_size"] == bert_config()["hidden_size"]
    assert checkpoint.tensor("embeddings.LayerNorm.bias", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        checkpoint.tensor("nothing")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process has mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_does_not_keep_the_file_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    write_bert(tmp_path)
    encoder = load_text_encoder(spec(), tmp_path, device=torch.device("cpu"), dtype=dtype)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    encoder.warm_up()

"""JinaBERT in both block forms against float64, and what it must not be mistaken for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import Random, spec, write_bert
from tests.modeling.reference import jina_bert, tensors_of
from tests.modeling.support import LENGTHS, LONG, config_of, cosine, random_ids
from tests.text_checkpoints import write_jina_bert

VOCABULARY = 268


def load(directory: Path, dtype: torch.dtype, width: int = 32) -> TextEncoder:
    entry = spec(family="jina_bert", dimensions=width, context_length=2048)
    return load_text_encoder(entry, directory, device=torch.device("cpu"), dtype=dtype)


def expected(directory: Path, ids: np.ndarray) -> np.ndarray:
    return jina_bert(tensors_of(directory), config_of(directory), ids).mean(0).numpy()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("query_norm", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (4, 32), (6, 48), (12, 96)])
def test_vectors_are_those_of_float64(tmp_path: Path, heads: int, width: int, query_norm: bool) -> None:
    write_jina_bert(tmp_path, query_norm=query_norm, hidden_size=width, num_attention_heads=heads)
    encoder = load(tmp_path, torch.float32, width)
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids)])
        np.testing.assert_allclose(vector, expected(tmp_path, ids), atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("query_norm", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (12, 192)])
def test_bf16_stays_close_to_float64(tmp_path: Path, heads: int, width: int, query_norm: bool) -> None:
    write_jina_bert(
        tmp_path,
        query_norm=query_norm,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=2 * width + 16,
        random=Random(gain=1.0),
    )
    encoder = load(tmp_path, torch.bfloat16, width)
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids)])
        assert cosine(vector, expected(tmp_path, ids)) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("query_norm", [False, True])
def test_a_long_text_is_right_in_both_number_formats(tmp_path: Path, query_norm: bool) -> None:
    write_jina_bert(
        tmp_path,
        query_norm=query_norm,
        hidden_size=96,
        num_attention_heads=12,
        num_hidden_layers=1,
        random=Random(gain=1.0),
    )
    ids = random_ids(LONG, VOCABULARY)
    wanted = expected(tmp_path, ids)
    (vector,) = load(tmp_path, torch.float32, 96).forward([EncodeItem(ids)])
    np.testing.assert_allclose(vector, wanted, atol=1e-5)
    (vector,) = load(tmp_path, torch.bfloat16, 96).forward([EncodeItem(ids)])
    assert cosine(vector, wanted) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("query_norm", [False, True])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999999), (torch.bfloat16, 0.9999)])
def test_a_mixed_batch_gives_each_text_the_vector_it_has_alone(
    tmp_path: Path, dtype: torch.dtype, least: float, query_norm: bool
) -> None:
    write_jina_bert(tmp_path, query_norm=query_norm)
    encoder = load(tmp_path, dtype)
    lengths = [65, 1, 512, 7, 64, 7, 2, 300, 63, 1, 33, 128]
    items = [EncodeItem(random_ids(length, VOCABULARY, seed=i)) for i, length in enumerate(lengths)]
    for item, vector in zip(items, encoder.forward(items), strict=True):
        (alone,) = encoder.forward([item])
        assert vector.shape == (32,)
        assert cosine(vector, alone) > least


def test_the_halves_of_the_gate_are_not_interchangeable(tmp_path: Path) -> None:
    """The two block forms have them the other way round: a swap must show."""
    write_jina_bert(tmp_path)
    ids = random_ids(40, VOCABULARY)
    weights = tensors_of(tmp_path)
    for name in [name for name in weights if name.endswith("gated_layers.weight")]:
        weights[name] = torch.cat(weights[name].chunk(2)[::-1])
    swapped = jina_bert(weights, config_of(tmp_path), ids).mean(0).numpy()
    (vector,) = load(tmp_path, torch.float32).forward([EncodeItem(ids)])
    assert np.abs(vector - swapped).max() > 0.05


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_names_may_have_the_prefix_of_a_larger_model(tmp_path: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    write_jina_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    ids = random_ids(9, VOCABULARY)
    wanted = expected(tmp_path, ids)
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    (vector,) = load(tmp_path, torch.float32).forward([EncodeItem(ids)])
    np.testing.assert_allclose(vector, wanted, atol=1e-5)


def test_a_mix_of_the_block_forms_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_jina_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    other = load_file(write_jina_bert(tmp_path / "other", query_norm=True) / "model.safetensors")
    mixed = {n: t for n, t in load_file(path).items() if ".1." not in n} | {
        n: t for n, t in other.items() if ".1." in n
    }
    save_file(mixed, path)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.mlp\.gated_layers\.weight"):
        load(tmp_path, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [{"feed_forward_type": "reglu"}, {"hidden_act": "relu"}, {"feed_forward_type": "original"}],
)
def test_a_feed_forward_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    write_jina_bert(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path, torch.float32)


def test_a_stock_bert_is_not_taken_for_it_nor_it_for_a_stock_bert(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="looks like 'bert'"):
        load(tmp_path / "bert", torch.float32)
    write_jina_bert(tmp_path / "jina")
    with pytest.raises(CheckpointError, match="looks like 'jina_bert'"):
        load_text_encoder(spec(), tmp_path / "jina", device=torch.device("cpu"), dtype=torch.float32)


def test_a_network_too_short_for_the_catalogue_is_refused(tmp_path: Path) -> None:
    write_jina_bert(tmp_path, max_position_embeddings=512)
    with pytest.raises(CheckpointError, match="2048 tokens"):
        load(tmp_path, torch.float32)

"""Stock BERT against transformers' own, and batches against single texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from services.core.modeling.families.encoder import Encoder
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.checkpoints import spec, write_bert

LENGTHS = (1, 2, 63, 64, 65, 512)


def load(directory: Path, dtype: torch.dtype, width: int) -> Encoder:
    encoder = load_text_encoder(
        spec(dimensions=width, context_length=512), directory, device=torch.device("cpu"), dtype=dtype
    )
    assert isinstance(encoder, Encoder)
    return encoder


def reference(directory: Path, ids: np.ndarray) -> np.ndarray:
    model = BertModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].mean(0).numpy()


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + length).integers(0, 19, length, dtype=np.int32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [1, 3, 4, 12])
def test_hidden_states_are_those_of_transformers_in_fp32(tmp_path: Path, heads: int) -> None:
    width = heads * 8 if heads > 1 else 16
    write_bert(tmp_path, hidden_size=width, num_attention_heads=heads, max_position_embeddings=512)
    encoder = load(tmp_path, torch.float32, width)
    for length in LENGTHS:
        ids = random_ids(length)
        (vector,) = encoder.forward([EncodeItem(ids)])
        np.testing.assert_allclose(vector, reference(tmp_path, ids), atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (2, 96), (12, 384)])
def test_bf16_stays_close_to_transformers_in_fp32(tmp_path: Path, heads: int, width: int) -> None:
    write_bert(
        tmp_path,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=2 * width + 16,
        max_position_embeddings=512,
    )
    encoder = load(tmp_path, torch.bfloat16, width)
    for length in LENGTHS:
        ids = random_ids(length)
        (vector,) = encoder.forward([EncodeItem(ids)])
        assert cosine(vector, reference(tmp_path, ids)) > 0.9995


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999999), (torch.bfloat16, 0.9999)])
def test_a_mixed_batch_gives_each_text_the_vector_it_has_alone(
    tmp_path: Path, dtype: torch.dtype, least: float
) -> None:
    write_bert(tmp_path, max_position_embeddings=512)
    encoder = load(tmp_path, dtype, 32)
    lengths = [65, 1, 512, 7, 64, 7, 2, 300, 63, 1, 33, 128]
    items = [EncodeItem(random_ids(length, seed=i)) for i, length in enumerate(lengths)]
    together = encoder.forward(items)
    for item, vector in zip(items, together, strict=True):
        (alone,) = encoder.forward([item])
        assert vector.dtype == np.float32
        assert vector.shape == (32,)
        assert cosine(vector, alone) > least


@pytest.mark.parametrize(("pooling", "index"), [("cls_token", 0), ("lasttoken", -1)])
def test_the_pooling_of_the_checkpoint_is_used(tmp_path: Path, pooling: str, index: int) -> None:
    write_bert(tmp_path, pooling=pooling)
    encoder = load_text_encoder(spec(), tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    model = BertModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    items = [EncodeItem(random_ids(length)) for length in (5, 3, 9)]
    for item, vector in zip(items, encoder.forward(items), strict=True):
        with torch.inference_mode():
            states = model(torch.from_numpy(item.token_ids).long()[None]).last_hidden_state[0]
        np.testing.assert_allclose(vector, states[index].numpy(), atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_item_with_spans_gets_one_mean_per_span(tmp_path: Path, dtype: torch.dtype) -> None:
    write_bert(tmp_path)
    encoder = load_text_encoder(spec(), tmp_path, device=torch.device("cpu"), dtype=dtype)
    ids = random_ids(12)
    spans = ((0, 4), (4, 12), (0, 12))
    plain, spanned = encoder.forward([EncodeItem(random_ids(3)), EncodeItem(ids, spans=spans)])
    assert plain.shape == (32,)
    assert spanned.shape == (3, 32)
    (whole,) = encoder.forward([EncodeItem(ids)])
    np.testing.assert_allclose(spanned[2], whole, atol=1e-5)
    np.testing.assert_allclose((4 * spanned[0] + 8 * spanned[1]) / 12, whole, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (EncodeItem(random_ids(65)), "65 tokens"),
        (EncodeItem(np.empty(0, np.int32)), "no tokens"),
        (EncodeItem(random_ids(4), spans=((0, 5),)), "span"),
        (EncodeItem(random_ids(4), spans=((2, 2),)), "span"),
        (EncodeItem(random_ids(4), adapter="retrieval.query"), "adapter"),
        (EncodeItem(np.array([1, 19], np.int32)), "vocabulary"),
        (EncodeItem(np.array([-1], np.int32)), "vocabulary"),
    ],
)
def test_an_item_the_network_cannot_take_is_refused(
    tmp_path: Path, dtype: torch.dtype, item: EncodeItem, reason: str
) -> None:
    write_bert(tmp_path)
    encoder = load_text_encoder(spec(), tmp_path, device=torch.device("cpu"), dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        encoder.forward([item])


def test_warm_up_runs(tmp_path: Path) -> None:
    write_bert(tmp_path)
    encoder = load_text_encoder(spec(), tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    encoder.warm_up()

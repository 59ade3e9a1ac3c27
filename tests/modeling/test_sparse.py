"""Sparse encoders against transformers' BertForMaskedLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from services.core.catalog.types import OutputKind
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families import sparse
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, SparseVector, TextEncoder
from tests.checkpoints import Random, spec, write_bert
from tests.modeling.support import LENGTHS, cosine, random_ids
from tests.text_checkpoints import write_elser


def load(directory: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    entry = spec(family="elser", context_length=512, outputs=(OutputKind.SPARSE,))
    return load_text_encoder(entry, directory, device=torch.device("cpu"), dtype=dtype)


def reference(directory: Path, ids: np.ndarray) -> np.ndarray:
    model = BertForMaskedLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0]
    return torch.log1p(torch.relu(logits)).amax(0).numpy()


def whole(found: object, vocabulary: int = 19) -> np.ndarray:
    assert isinstance(found, SparseVector)
    assert found.values.min(initial=1.0) > 0
    assert np.all(np.diff(found.indices) > 0)
    dense = np.zeros(vocabulary, np.float32)
    dense[found.indices] = found.values
    return dense


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [1, 3, 4, 12])
def test_weights_are_those_of_transformers(tmp_path: Path, heads: int) -> None:
    write_elser(tmp_path, hidden_size=8 * heads, num_attention_heads=heads, max_position_embeddings=512)
    encoder = load(tmp_path)
    empty = 0
    for length in LENGTHS:
        ids = random_ids(length, 19)
        found = whole(encoder.forward([EncodeItem(ids)])[0])
        np.testing.assert_allclose(found, reference(tmp_path, ids), atol=1e-5)
        empty += int((found == 0).sum())
    assert empty > 0


@pytest.mark.usefixtures("backend")
def test_bf16_stays_close(tmp_path: Path) -> None:
    write_elser(
        tmp_path,
        hidden_size=96,
        num_attention_heads=12,
        max_position_embeddings=512,
        random=Random(gain=1.0),
    )
    encoder = load(tmp_path, torch.bfloat16)
    for length in LENGTHS:
        ids = random_ids(length, 19)
        assert cosine(whole(encoder.forward([EncodeItem(ids)])[0]), reference(tmp_path, ids)) > 0.9999


def test_a_batch_in_pieces_gives_what_each_text_gives_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_elser(tmp_path, max_position_embeddings=512)
    items = [EncodeItem(random_ids(length, 19, seed=i)) for i, length in enumerate((3, 70, 1, 33, 3, 512))]
    alone = [load(tmp_path).forward([item])[0] for item in items]
    monkeypatch.setattr(sparse, "_LOGITS", 19 * 32)
    for one, together in zip(alone, load(tmp_path).forward(items), strict=True):
        np.testing.assert_allclose(whole(together), whole(one), atol=1e-6)


def test_a_decoder_of_its_own_is_used(tmp_path: Path) -> None:
    path = write_elser(tmp_path, max_position_embeddings=512) / "model.safetensors"
    tensors = load_file(path)
    table = Random(1).normal(19, 32)
    save_file(tensors | {"cls.predictions.decoder.weight": table}, path)
    ids = random_ids(9, 19)
    found = whole(load(tmp_path).forward([EncodeItem(ids)])[0])
    save_file(tensors, path)
    assert np.abs(found - whole(load(tmp_path).forward([EncodeItem(ids)])[0])).max() > 0.1


def test_a_checkpoint_without_the_head_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="looks like 'bert'"):
        load(tmp_path / "plain")
    write_bert(tmp_path / "headless", architectures=["BertForMaskedLM"], max_position_embeddings=512)
    with pytest.raises(CheckpointError, match=r"missing tensors: cls\.predictions\.bias"):
        load(tmp_path / "headless")

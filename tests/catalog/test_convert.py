"""Converting a sparse encoder that an operator owns: an archive or a pickled state, and a vocabulary."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from search_foundation.commands.models_check import check
from search_foundation.commands.models_convert import convert
from services.core.catalog import Catalog, CatalogError
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, SparseVector
from services.core.settings import Settings
from tests.checkpoints import WORDS
from tests.text_checkpoints import write_elser

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


class Elser(torch.nn.Module):
    """As Elastic's archive is built: the network under a name of its own, pooling inside."""

    def __init__(self, network: BertForMaskedLM) -> None:
        super().__init__()
        self.model = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return torch.amax(torch.log1p(torch.relu(logits)) * mask[..., None], dim=1)


def network(tmp_path: Path) -> BertForMaskedLM:
    folder = write_elser(tmp_path / "source", max_position_embeddings=512)
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "eager"
    model = BertForMaskedLM(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model


def archive(tmp_path: Path) -> Path:
    path = tmp_path / "elser_model_2.pt"
    ids = torch.tensor([[2, 5, 6, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Elser(network(tmp_path)), (ids, torch.ones_like(ids)))
        torch.jit.save(traced, path)
    return path


def state(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(dict(network(tmp_path).state_dict()) | more, path)
    return path


def vocabulary(tmp_path: Path, tokens: list[str] | None = None) -> Path:
    path = tmp_path / "elser_model_2.vocab.json"
    path.write_text(json.dumps({"vocabulary": TOKENS if tokens is None else tokens}))
    return path


def run(capsys: pytest.CaptureFixture[str], source: Path, words: Path, target: Path, **changes: Any) -> str:
    """What the command says where it refuses; empty if it does what it is told."""
    values = {"source": source, "vocabulary": words, "to": target, "model": "elser-v2", "heads": 4} | changes
    status = convert(argparse.Namespace(**values), Settings(), Catalog.load())
    said = capsys.readouterr()
    assert status == (1 if said.err else 0)
    return said.err


@pytest.mark.parametrize("make", [archive, state])
def test_what_is_written_computes_what_the_source_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any
) -> None:
    target = tmp_path / "elser-v2"
    assert run(capsys, make(tmp_path), vocabulary(tmp_path), target) == ""
    spec = Catalog.load().require("elser-v2")
    encoder = load_text_encoder(spec, target, device=torch.device("cpu"), dtype=torch.float32)
    (tokens,) = encoder.tokenizer.encode_batch(["Hello world."])
    assert tokens.ids.tolist() == [2, 5, 6, 17, 3]
    (found,) = encoder.forward([EncodeItem(tokens.ids)])
    assert isinstance(found, SparseVector)
    ids = torch.from_numpy(tokens.ids).long()[None]
    with torch.inference_mode():
        wanted = Elser(network(tmp_path / "again"))(ids, torch.ones_like(ids))[0].numpy()
    whole = np.zeros_like(wanted)
    whole[found.indices] = found.values
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    arguments = argparse.Namespace(folder=str(target), model=None, json=True)
    assert check(arguments, Settings(), Catalog.load()) == 0


def test_a_bias_known_only_by_the_decoder_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = state(tmp_path)
    tensors = torch.load(path, weights_only=True)
    del tensors["cls.predictions.bias"]
    torch.save(tensors, path)
    assert run(capsys, path, vocabulary(tmp_path), tmp_path / "elser-v2") == ""
    arguments = argparse.Namespace(folder=str(tmp_path / "elser-v2"), model=None, json=True)
    assert check(arguments, Settings(), Catalog.load()) == 0


def test_a_vocabulary_may_be_a_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(TOKENS) + "\n")
    assert run(capsys, state(tmp_path), words, tmp_path / "out") == ""
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_by_default_it_goes_where_a_process_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_MODEL_DIR", str(tmp_path / "models"))
    assert run(capsys, state(tmp_path), vocabulary(tmp_path), None) == ""  # type: ignore[arg-type]
    assert (tmp_path / "models" / "elser-v2" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "tokens", "said"),
    [
        ({"strange.weight": torch.ones(2)}, None, "not known what the tensor 'strange.weight' is"),
        ({"other.embeddings.word_embeddings.weight": torch.ones(2)}, None, "2 tensors named"),
        ({"epoch": 3}, None, "other things than tensors"),
        ({}, TOKENS[:-1], "18 tokens, the network has 19"),
        ({}, [*TOKENS[:4], "x", *TOKENS[5:]], r"no tokens [MASK]"),
        ({}, {"a": 1}, "no list of tokens"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    tokens: list[str] | None,
    said: str,
) -> None:
    target = tmp_path / "out"
    assert said in run(capsys, state(tmp_path, **more), vocabulary(tmp_path, tokens), target)
    assert not target.exists()


def test_a_file_of_another_kind_and_a_folder_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "model.pt"
    other.write_bytes(b"nothing of the kind")
    assert "neither a TorchScript archive" in run(capsys, other, vocabulary(tmp_path), tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert "is there already" in run(capsys, other, vocabulary(tmp_path), tmp_path / "out")
    with pytest.raises(CatalogError, match="no sparse encoder"):
        run(capsys, other, vocabulary(tmp_path), tmp_path / "new", model="jina-embeddings-v3")

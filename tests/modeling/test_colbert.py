"""ColBERT: the two written forms, the vectors of their tokens, and late interaction over them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from services.core.catalog.types import OutputKind
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.colbert import ColbertEncoder
from services.core.modeling.layers.maxsim import maxsim
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.checkpoints import Random, spec
from tests.modeling.reference import jina_bert, tensors_of, xlm_rotary
from tests.modeling.support import LENGTHS, LONG, config_of, cosine, random_ids
from tests.text_checkpoints import write_colbert_v1, write_colbert_v2, write_jina_bert

FAMILIES = {"colbert_v1": write_colbert_v1, "colbert_v2": write_colbert_v2}
MARKERS = {"colbert_v1": ("[unused0]", "[unused1]"), "colbert_v2": ("[QueryMarker]", "[DocumentMarker]")}
MASK = {"colbert_v1": "[MASK]", "colbert_v2": "<mask>"}

TEXTS = ["hello world", "", "the quick, brown fox.", "a dog!", "hello " * 60, ", . ; hello-world (fox)"]


def load(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, dimensions: int = 128
) -> ColbertEncoder:
    entry = spec(
        family=family,
        context_length=2048,
        dimensions=dimensions,
        max_query_length=32,
        outputs=(OutputKind.MULTI_VECTOR,),
    )
    encoder = load_text_encoder(entry, directory, device=torch.device("cpu"), dtype=dtype)
    assert isinstance(encoder, ColbertEncoder)
    return encoder


def stock_tokenizer(directory: Path, family: str) -> PreTrainedTokenizerFast:
    pad, mask = ("[PAD]", "[MASK]") if family == "colbert_v1" else ("<pad>", "<mask>")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token=pad, mask_token=mask
    )


def written_query(directory: Path, family: str, text: str) -> tuple[list[int], int]:
    """The ids of a query and how many are attended to, as the original code writes them."""
    tokenizer = stock_tokenizer(directory, family)
    made = tokenizer(text, padding="max_length", truncation="longest_first", max_length=31)
    ids, mask = made["input_ids"], made["attention_mask"]
    ids = [ids[0], tokenizer.convert_tokens_to_ids(MARKERS[family][0]), *ids[1:]]
    mask = [mask[0], 1, *mask[1:]]
    ids = [tokenizer.mask_token_id if id == tokenizer.pad_token_id else id for id in ids]
    return ids, 32 if family == "colbert_v2" else sum(mask)


def written_document(directory: Path, family: str, text: str) -> tuple[list[int], list[bool]]:
    """The ids of a document, and which of them keep their vector."""
    tokenizer = stock_tokenizer(directory, family)
    ids = tokenizer(text, padding=False, truncation="longest_first", max_length=2047)["input_ids"]
    ids = [ids[0], tokenizer.convert_tokens_to_ids(MARKERS[family][1]), *ids[1:]]
    skipped = {tokenizer.encode(mark, add_special_tokens=False)[0] for mark in string.punctuation}
    return ids, [id not in skipped for id in ids]


def reference(directory: Path, family: str, ids: list[int], attended: int | None = None) -> np.ndarray:
    """Projected vectors (tokens, dimensions) in float64."""
    array = np.array(ids, np.int32)
    if family == "colbert_v1":
        weights = tensors_of(directory, "bert.")
        states = jina_bert(weights, config_of(directory), array, attended=attended)
    else:
        weights = tensors_of(directory, "roberta.")
        states = xlm_rotary(weights, config_of(directory), array)
    return (states @ weights["linear.weight"].T).numpy()


def query(encoder: ColbertEncoder, text: str) -> np.ndarray:
    (tokens,) = encoder.query_tokenizer.encode_batch([text], truncate_to=2048)
    return encoder.forward([EncodeItem(tokens.ids)])[0]


def document(encoder: ColbertEncoder, text: str) -> np.ndarray:
    (tokens,) = encoder.tokenizer.encode_batch([text], truncate_to=2048)
    return encoder.forward([EncodeItem(tokens.ids)])[0]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_documents_are_written_as_the_original_writes_them(tmp_path: Path, family: str) -> None:
    encoder = load(FAMILIES[family](tmp_path), family)
    for text, tokens in zip(
        TEXTS, encoder.query_tokenizer.encode_batch(TEXTS, truncate_to=2048), strict=True
    ):
        ids, shown = written_query(tmp_path, family, text)
        assert tokens.ids.tolist() == ids
        assert len(tokens.ids) == 32
        if family == "colbert_v1":
            assert min(tokens.length, 32) == shown
        assert tokens.truncated == (tokens.length > 32)
    for text, tokens in zip(TEXTS, encoder.tokenizer.encode_batch(TEXTS, truncate_to=2048), strict=True):
        assert tokens.ids.tolist() == written_document(tmp_path, family, text)[0]
        assert tokens.length == len(tokens.ids)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 24), (4, 32), (12, 96)])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_float64(tmp_path: Path, family: str, heads: int, width: int) -> None:
    FAMILIES[family](tmp_path, hidden_size=width, num_attention_heads=heads)
    encoder = load(tmp_path, family)
    for text in TEXTS:
        ids, shown = written_query(tmp_path, family, text)
        found = query(encoder, text)
        assert found.shape == (32, 128)
        np.testing.assert_allclose(unit(found), unit(reference(tmp_path, family, ids, shown)), atol=1e-5)
        ids, kept = written_document(tmp_path, family, text)
        found = document(encoder, text)
        np.testing.assert_allclose(unit(found), unit(reference(tmp_path, family, ids)[kept]), atol=1e-5)


def document_of(length: int, family: str, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Random ids of a document, its beginning as far as there is room, and which keep their vector."""
    tokenizer = stock_tokenizer(directory, family)
    ids = random_ids(length, tokenizer.vocab_size)
    ids[0] = tokenizer("")["input_ids"][0]
    ids[1:2] = tokenizer.convert_tokens_to_ids(MARKERS[family][1])
    skipped = [tokenizer.encode(mark, add_special_tokens=False)[0] for mark in string.punctuation]
    return ids, ~np.isin(ids, skipped)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_any_length_in_both_number_formats(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path, hidden_size=96, num_attention_heads=12, random=Random(gain=1.0))
    exact, rounded = (load(tmp_path, family, dtype) for dtype in (torch.float32, torch.bfloat16))
    for length in (*LENGTHS, LONG):
        ids, kept = document_of(length, family, tmp_path)
        wanted = reference(tmp_path, family, ids.tolist())[kept]
        found = np.asarray(exact.forward([EncodeItem(ids)])[0])
        np.testing.assert_allclose(unit(found), unit(wanted), atol=1e-5)
        assert cosine(np.ravel(rounded.forward([EncodeItem(ids)])[0]), wanted.ravel()) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_close_to_float64(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path, hidden_size=96, num_attention_heads=12, random=Random(gain=1.0))
    encoder = load(tmp_path, family, torch.bfloat16)
    for text in TEXTS:
        ids, shown = written_query(tmp_path, family, text)
        wanted = reference(tmp_path, family, ids, shown)
        assert cosine(query(encoder, text).ravel(), wanted.ravel()) > 0.9999
        ids, kept = written_document(tmp_path, family, text)
        wanted = reference(tmp_path, family, ids)[kept]
        assert cosine(document(encoder, text).ravel(), wanted.ravel()) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_documents_may_share_a_batch(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    encoder = load(FAMILIES[family](tmp_path), family, dtype)
    texts = [*TEXTS, " ".join(["fox"] * 29)]  # a document as long as a query is
    tokens = encoder.query_tokenizer.encode_batch(texts) + encoder.tokenizer.encode_batch(texts)
    items = [EncodeItem(each.ids) for each in tokens]
    for item, vectors in zip(items, encoder.forward(items), strict=True):
        (alone,) = encoder.forward([item])
        assert vectors.shape == alone.shape
        assert cosine(vectors.ravel(), alone.ravel()) > (0.999999 if dtype == torch.float32 else 0.9999)


@pytest.mark.usefixtures("backend")
def test_fillers_are_hidden_only_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    write_colbert_v1(tmp_path)
    hidden = query(load(tmp_path, "colbert_v1"), "hello")
    path = tmp_path / "artifact.metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attend_to_mask_tokens": True}))
    shown = query(load(tmp_path, "colbert_v1"), "hello")
    assert np.abs(hidden - shown).max() > 1e-3


def test_a_mask_in_the_text_is_no_filler(tmp_path: Path) -> None:
    write_colbert_v1(tmp_path)
    ids, shown = written_query(tmp_path, "colbert_v1", "hello [MASK] [MASK]")
    assert shown == 6
    found = query(load(tmp_path, "colbert_v1"), "hello [MASK] [MASK]")
    np.testing.assert_allclose(found, reference(tmp_path, "colbert_v1", ids, shown), atol=1e-5)


def test_punctuation_is_kept_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    write_colbert_v1(tmp_path)
    path = tmp_path / "artifact.metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_punctuation": False}))
    encoder = load(tmp_path, "colbert_v1")
    assert len(document(encoder, "hello , . world")) == 7
    path.unlink()
    assert len(document(load(tmp_path, "colbert_v1"), "hello , . world")) == 5


@pytest.mark.parametrize("dimensions", [64, 96, 128])
def test_the_projection_has_the_width_of_the_catalogue(tmp_path: Path, dimensions: int) -> None:
    write_colbert_v2(tmp_path, dimensions=dimensions)
    assert query(load(tmp_path, "colbert_v2", dimensions=dimensions), "hello").shape == (32, dimensions)
    with pytest.raises(CheckpointError, match=r"linear\.weight is"):
        load(tmp_path, "colbert_v2", dimensions=32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"similarity": "l2"}, "similarity"),
        ({"query_token_id": 1}, "query_token_id"),
        ({"mask_punctuation": "yes"}, "mask_punctuation"),
    ],
)
def test_rules_that_are_not_served_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_colbert_v1(tmp_path) / "artifact.metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, "colbert_v1")


def test_a_tokenizer_without_the_markers_is_refused(tmp_path: Path) -> None:
    write_colbert_v2(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("[QueryMarker]", "[Other]"))
    with pytest.raises(CheckpointError, match="QueryMarker"):
        load(tmp_path, "colbert_v2")


def test_a_checkpoint_without_the_projection_is_refused(tmp_path: Path) -> None:
    path = write_colbert_v2(tmp_path / "v2") / "model.safetensors"
    tensors = load_file(path)
    del tensors["linear.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing tensors: linear\.weight"):
        load(tmp_path / "v2", "colbert_v2")
    write_jina_bert(tmp_path / "v2-base")
    with pytest.raises(CheckpointError, match="looks like 'jina_bert'"):
        load(tmp_path / "v2-base", "colbert_v1")


def test_maxsim_is_the_sum_of_the_best() -> None:
    random = np.random.default_rng(0)
    asked = unit(random.normal(size=(32, 16))).astype(np.float32)
    documents = [unit(random.normal(size=(n, 16))).astype(np.float32) for n in (1, 3, 5000, 700, 4096, 2, 9)]
    scores = maxsim(asked, documents)
    wanted = [sum(max(float(a @ b) for b in each) for a in asked) for each in documents]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    assert scores.dtype == np.float32


def test_the_base_of_the_angles_may_be_left_out(tmp_path: Path) -> None:
    write_colbert_v2(tmp_path)
    wanted = document(load(tmp_path, "colbert_v2"), "hello world")
    config = config_of(tmp_path)
    assert config.pop("rotary_emb_base") == 10000.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(document(load(tmp_path, "colbert_v2"), "hello world"), wanted)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rotary_emb_base": 500.0}))
    assert np.abs(document(load(tmp_path, "colbert_v2"), "hello world") - wanted).max() > 1e-3


def test_warm_up_runs(tmp_path: Path) -> None:
    load(write_colbert_v1(tmp_path), "colbert_v1").warm_up()

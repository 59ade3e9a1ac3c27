"""The network of jina-reranker-v3 and v3.5, against transformers' Qwen3 in float64."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.catalog import Catalog
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.decoder import decoder_shapes
from services.core.modeling.families.decoder_config import QWEN3, DecoderConfig
from services.core.modeling.families.listwise import ListwiseRanker, projector_shapes, prompt, without_markers
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem
from tests.checkpoints import Random
from tests.decoder_checkpoints import MARKERS, qwen_tokenizer, ranker_config, write_ranker
from tests.modeling.stock import states, stock_model
from tests.modeling.support import cosine

DOCUMENTS = ["hello world", "", "a fox", "hello hello, it is me", "hello world"]
HYBRID = {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 600,
}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> ListwiseRanker:
    spec = Catalog.load().require("jina-reranker-v3")
    ranker = load_network(spec, directory, device=torch.device("cpu"), dtype=dtype)
    assert isinstance(ranker, ListwiseRanker)
    return ranker


def ids_of(text: str) -> np.ndarray:
    return np.array(qwen_tokenizer(*MARKERS).encode(text).ids, np.int32)


def expected(directory: Path, ids: np.ndarray) -> np.ndarray:
    """The projected states at the markers, the query's first."""
    tensors = load_file(directory / "model.safetensors")
    tokenizer = qwen_tokenizer(*MARKERS)
    hidden = states(stock_model(directory, "ranker"), ids)
    rows = [i for i, id in enumerate(ids) if id == tokenizer.token_to_id(MARKERS[1])]
    rows += [i for i, id in enumerate(ids) if id == tokenizer.token_to_id(MARKERS[0])]
    first, second = (tensors[f"projector.{i}.weight"].double() for i in (0, 2))
    return (torch.clamp(hidden[rows] @ first.T, min=0) @ second.T).numpy()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("changes", [{}, HYBRID])
def test_vectors_at_the_markers_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_ranker(tmp_path, **changes)
    ranker = load(tmp_path)
    prompts = [prompt("who is it", DOCUMENTS), prompt("", ["x"])]
    tokens = ranker.tokenizer.prompts(prompts)
    assert [each.tolist() for each in tokens] == [ids_of(text).tolist() for text in prompts]
    assert len(tokens[0]) > 700
    found = ranker.forward([EncodeItem(ids) for ids in tokens])
    assert [each.shape for each in found] == [(6, 512), (2, 512)]
    for vectors, ids in zip(found, tokens, strict=True):
        np.testing.assert_allclose(vectors, expected(tmp_path, ids), atol=5e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("changes", [{}, HYBRID])
def test_bf16_stays_close_to_float64(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_ranker(tmp_path, hidden_size=96, intermediate_size=208, random=Random(gain=1.0), **changes)
    ranker = load(tmp_path, torch.bfloat16)
    (ids,) = ranker.tokenizer.prompts([prompt("who is it", DOCUMENTS)])
    (found,) = ranker.forward([EncodeItem(ids)])
    for vector, wanted in zip(found, expected(tmp_path, ids), strict=True):
        assert cosine(vector, wanted) > 0.9995


def test_windows_change_only_prompts_longer_than_they_are(tmp_path: Path) -> None:
    write_ranker(tmp_path / "v3")
    write_ranker(tmp_path / "v3.5", **HYBRID | {"sliding_window": 1024})
    full, hybrid = load(tmp_path / "v3"), load(tmp_path / "v3.5")
    short, long = full.tokenizer.prompts(
        [prompt("hello", ["world"]), prompt("hello", [f"world {i}" * 9 for i in range(9)])]
    )
    assert len(short) < 1024 < len(long)
    np.testing.assert_array_equal(
        full.forward([EncodeItem(short)])[0], hybrid.forward([EncodeItem(short)])[0]
    )
    difference = full.forward([EncodeItem(long)])[0] - hybrid.forward([EncodeItem(long)])[0]
    assert np.abs(difference).max() > 0.001


def test_a_prompt_is_read_alone_whatever_runs_beside_it(tmp_path: Path) -> None:
    write_ranker(tmp_path)
    ranker = load(tmp_path)
    prompts = [prompt("hello", DOCUMENTS[: i % 3 + 1]) for i in range(5)]
    items = [EncodeItem(ids) for ids in ranker.tokenizer.prompts(prompts)]
    for item, vectors in zip(items, ranker.forward(items), strict=True):
        np.testing.assert_allclose(vectors, ranker.forward([item])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("plain <|im_end|>", "plain <|im_end|>"),
        ("a<|embed_token|>b<|rerank_token|>", "ab"),
        ("<|embed_<|embed_token|>token|>c", "c"),
        ("<|embed_<|rerank_token|>token|>c<|rerank_<|embed_token|>token|>", "c"),
        ("x" + "<|embed_" * 50_000 + "token|>" * 50_001 + "y", "xtoken|>y"),
    ],
)
def test_no_marker_of_a_caller_is_left(text: str, bare: str) -> None:
    assert without_markers(text) == bare


def test_texts_are_cut_in_tokens(tmp_path: Path) -> None:
    write_ranker(tmp_path)
    tokenizer = load(tmp_path).tokenizer
    cut = tokenizer.cut(["hello world", "hello<|embed_token|> wor", "", "xyz"], 3)
    assert [each.text for each in cut] == ["hello worl", "hello wor", "", "xyz"]
    assert [each.length for each in cut] == [3, 3, 0, 3]
    assert [each.truncated for each in cut] == [True, False, False, False]
    assert tokenizer.cut(["hello world"], 0)[0].text == "hello"


def test_a_prompt_needs_its_markers(tmp_path: Path) -> None:
    write_ranker(tmp_path)
    ranker = load(tmp_path)
    ranker.warm_up()
    for text in ("hello", MARKERS[0], MARKERS[1], MARKERS[0] + 2 * MARKERS[1]):
        with pytest.raises(ValueError, match="a prompt with"):
            ranker.forward([EncodeItem(ids_of(text))])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_ranker(tmp_path, dimensions=256)
    with pytest.raises(CheckpointError, match=r"projector\.2\.weight is \[256, 16\]"):
        load(tmp_path)
    write_ranker(tmp_path, dimensions=256, embedding_size=256)
    with pytest.raises(CheckpointError, match="vectors of 256 numbers"):
        load(tmp_path)
    path = write_ranker(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"projector.0.bias": torch.zeros(16)}, path)
    with pytest.raises(CheckpointError, match=r"does not know: projector\.0\.bias"):
        load(tmp_path)
    write_ranker(tmp_path)
    qwen_tokenizer(MARKERS[0]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="rerank_token"):
        load(tmp_path)
    write_ranker(tmp_path, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match="of no network served here"):
        load(tmp_path)
    write_ranker(tmp_path, max_position_embeddings=32768)
    with pytest.raises(CheckpointError, match="32768 positions"):
        load(tmp_path)


@pytest.mark.parametrize("model", ["jina-reranker-v3", "jina-reranker-v3.5"])
def test_the_published_size_adds_up(model: str) -> None:
    config = ranker_config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
    )
    shapes = decoder_shapes(DecoderConfig.read(config, QWEN3)) | projector_shapes(1024, 512)
    assert sum(map(prod, shapes.values())) == 596_836_352
    assert Catalog.load().require(model).parameters == 596_836_352


def test_the_prompt_is_the_published_one() -> None:
    text = prompt("who", ["one", "two"])
    assert json.dumps(text[text.index("I will provide") :]) == json.dumps(
        "I will provide you with 2 passages, each indicated by a numerical identifier. Rank the passages "
        "based on their relevance to query: who\n"
        '<passage id="0">\none<|embed_token|>\n</passage>\n<passage id="1">\ntwo<|embed_token|>\n</passage>\n'
        "<query>\nwho<|rerank_token|>\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )

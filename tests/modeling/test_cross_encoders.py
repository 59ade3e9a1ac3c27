"""Rerankers that read query and document together: scores, pair forms, cuts and windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForSequenceClassification

from services.core.catalog.types import Capability, ModelSpec, OutputKind, RerankMethod
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.families.pairs import PairRules, PairTokenizer, longest_first
from services.core.modeling.registry import load_cross_encoder
from services.core.modeling.types import EncodeItem
from tests.checkpoints import Random, spec, word_pieces
from tests.modeling.reference import jina_bert, score, tensors_of
from tests.modeling.support import LENGTHS, LONG, config_of, cosine, random_ids
from tests.text_checkpoints import (
    WORDS,
    byte_pairs,
    sentence_pieces,
    write_jina_bert,
    write_reranker_v1,
    write_reranker_v2,
)

QUERY = "hello world"
DOCUMENTS = ["the quick brown fox", "hello", "a dog, a fox. hello world", "the the the the"]


def entry(family: str, length: int = 64, query_length: int = 0) -> ModelSpec:
    return spec(
        family=family,
        context_length=length,
        max_query_length=query_length,
        capabilities=frozenset({Capability.RERANK}),
        outputs=(OutputKind.SCORE,),
        rerank=RerankMethod.CROSS_ENCODER,
    )


def load(directory: Path, family: ModelSpec, dtype: torch.dtype = torch.float32) -> CrossEncoder:
    return load_cross_encoder(family, directory, device=torch.device("cpu"), dtype=dtype)


def v1_reference(directory: Path, ids: np.ndarray) -> float:
    weights = tensors_of(directory, "bert.")
    return score(weights, "pooler.dense", "classifier", jina_bert(weights, config_of(directory), ids)[0])


def v2_reference(directory: Path) -> XLMRobertaForSequenceClassification:
    """transformers' own class with the names of the published checkpoint put into its own."""
    config = config_of(directory)
    kept = {name: value for name, value in config.items() if name not in ("architectures", "auto_map")}
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(**kept)).double().eval()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(directory).items():
        renamed = name.replace("roberta.emb_ln", "roberta.embeddings.LayerNorm").replace(
            ".layers.", ".layer."
        )
        for ours, theirs in (
            ("mixer.out_proj", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("norm2", "output.LayerNorm"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            renamed = renamed.replace(ours, theirs)
        if "mixer.Wqkv" in renamed:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[renamed.replace("mixer.Wqkv", f"attention.self.{part}")] = chunk
        else:
            state[renamed] = tensor
    model.load_state_dict(state, strict=True)
    return model


def v2_score(model: XLMRobertaForSequenceClassification, ids: np.ndarray) -> float:
    with torch.inference_mode():
        return float(model(torch.from_numpy(ids).long()[None]).logits.sigmoid())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 24), (4, 32), (12, 96)])
def test_v1_scores_are_those_of_float64(tmp_path: Path, heads: int, width: int) -> None:
    write_reranker_v1(tmp_path, hidden_size=width, num_attention_heads=heads)
    model = load(tmp_path, entry("reranker_v1", 2048))
    items = [EncodeItem(random_ids(length, 268)) for length in (*LENGTHS, LONG)]
    wanted = [v1_reference(tmp_path, item.token_ids) for item in items]
    np.testing.assert_allclose(model.forward(items), wanted, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 24), (4, 32), (12, 96)])
def test_v2_scores_are_those_of_transformers(tmp_path: Path, heads: int, width: int) -> None:
    """Up to the 1,024 tokens that the network takes; longer documents are read in windows."""
    write_reranker_v2(tmp_path, hidden_size=width, num_attention_heads=heads, max_position_embeddings=1026)
    model = load(tmp_path, entry("reranker_v2", 1024))
    items = [EncodeItem(random_ids(length, 30) + 4) for length in (*LENGTHS, 1024)]
    reference = v2_reference(tmp_path)
    wanted = [v2_score(reference, item.token_ids) for item in items]
    np.testing.assert_allclose(model.forward(items), wanted, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("family", ["reranker_v1", "reranker_v2"])
def test_bf16_scores_stay_close(tmp_path: Path, family: str) -> None:
    write = write_reranker_v1 if family == "reranker_v1" else write_reranker_v2
    write(tmp_path, random=Random(gain=1.0), max_position_embeddings=1026)
    exact, rounded = (load(tmp_path, entry(family, 512), dtype) for dtype in (torch.float32, torch.bfloat16))
    items = [EncodeItem(random_ids(length, 30) + 4) for length in LENGTHS]
    found = np.array(rounded.forward(items))
    np.testing.assert_allclose(found, exact.forward(items), atol=1e-2)
    assert cosine(found, np.array(exact.forward(items))) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("family", ["reranker_v1", "reranker_v2"])
def test_a_mixed_batch_gives_each_pair_the_score_it_has_alone(
    tmp_path: Path, family: str, dtype: torch.dtype, apart: float
) -> None:
    write = write_reranker_v1 if family == "reranker_v1" else write_reranker_v2
    write(tmp_path, random=Random(gain=1.0), max_position_embeddings=1026)
    model = load(tmp_path, entry(family, 512), dtype)
    lengths = (65, 1, 512, 7, 64, 7, 2, 300, 63)
    items = [EncodeItem(random_ids(length, 30, seed=i) + 4) for i, length in enumerate(lengths)]
    alone = [model.forward([item])[0] for item in items]
    np.testing.assert_allclose(model.forward(items), alone, atol=apart)
    assert np.ptp(alone) > 10 * apart


@pytest.mark.parametrize("tokenizer", [byte_pairs(), sentence_pieces(), word_pieces()])
def test_a_pair_is_joined_as_transformers_joins_it(tokenizer: object, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))  # type: ignore[attr-defined]
    stock = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    pairs = PairTokenizer(Tokenizer.load(tmp_path), PairRules(64))
    made = pairs.pairs(pairs.query(QUERY), DOCUMENTS)
    for pair, document in zip(made, DOCUMENTS, strict=True):
        (window,) = pair.windows
        assert window.tolist() == stock(QUERY, document, padding=False, truncation=False)["input_ids"]
        assert pair.document_length == len(stock(document, padding=False, truncation=False)["input_ids"])
        assert not pair.truncated


def test_an_empty_document_is_a_pair_too(tmp_path: Path) -> None:
    write_reranker_v2(tmp_path)
    pairs = load(tmp_path, entry("reranker_v2", 20, 10)).tokenizer
    (pair,) = pairs.pairs(pairs.query("hello"), [""])
    assert pair.windows[0].tolist() == [0, 5, 2, 2, 2]


@pytest.mark.parametrize(("query", "document"), [(3, 40), (40, 3), (30, 30), (31, 20), (9, 10), (20, 31)])
def test_the_longer_text_of_a_pair_is_cut(tmp_path: Path, query: int, document: int) -> None:
    sentence_pieces().save(str(tmp_path / "tokenizer.json"))
    stock = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    pairs = PairTokenizer(Tokenizer.load(tmp_path), PairRules(24))
    texts = " ".join(["hello"] * query), " ".join(["world"] * document)
    (pair,) = pairs.pairs(pairs.query(texts[0]), [texts[1]])
    assert pair.windows[0].tolist() == stock(*texts, truncation="longest_first", max_length=24)["input_ids"]
    assert pair.truncated == (query + document > 20)


def test_longest_first_never_passes_the_room() -> None:
    for room in range(2, 12):
        for first in range(15):
            for second in range(15):
                kept, rest = longest_first(first, second, room)
                assert kept <= first
                assert rest <= second
                assert kept + rest == min(room, first + second)


@pytest.mark.parametrize("length", [10, 14, 15, 16, 27, 28, 40, 100])
def test_a_long_document_is_read_in_windows(tmp_path: Path, length: int) -> None:
    """As the published code does: steps of room - overlap, the last window at the very end."""
    write_reranker_v2(tmp_path)
    model = load(tmp_path, entry("reranker_v2", 20, 10))
    query = model.tokenizer.query(QUERY)
    words = [WORDS[i * i % len(WORDS)] for i in range(length)]
    (pair,) = model.tokenizer.pairs(query, [" ".join(words)])
    document = [sentence_pieces().token_to_id(f"▁{word}") for word in words]
    whole = [0, *query.ids.tolist(), 2]
    room = 20 - len(whole) - 2
    overlap = min(80, room // 4)
    windows = []
    if length <= room:
        windows.append(document)
    else:
        start = 0
        while start < length:
            end = start + room
            windows.append(document[-room:] if end >= length else document[start:end])
            start = end - overlap if end < length else end
    assert [window.tolist() for window in pair.windows] == [[*whole, 2, *part, 2] for part in windows]
    assert pair.document_length == length + 2
    assert not pair.truncated


def test_a_query_is_cut_at_its_own_length(tmp_path: Path) -> None:
    write_reranker_v2(tmp_path)
    tokens = load(tmp_path, entry("reranker_v2", 20, 10)).tokenizer.query("hello " * 30)
    assert len(tokens.ids) == 8
    assert tokens.truncated


def test_a_document_can_be_cut_before_it_is_read(tmp_path: Path) -> None:
    write_reranker_v2(tmp_path)
    pairs = load(tmp_path, entry("reranker_v2", 20, 10)).tokenizer
    (pair,) = pairs.pairs(pairs.query(QUERY), ["hello " * 30], longest=12)
    assert (len(pair.windows), pair.document_length, pair.truncated) == (1, 12, True)


def test_windows_that_a_query_could_fill_are_refused(tmp_path: Path) -> None:
    write_reranker_v2(tmp_path)
    with pytest.raises(CheckpointError, match="two queries"):
        load(tmp_path, entry("reranker_v2", 20, 11))


def test_an_embedding_model_is_not_taken_for_a_reranker_nor_the_other_way_round(tmp_path: Path) -> None:
    write_jina_bert(tmp_path / "embedding")
    with pytest.raises(CheckpointError, match=r"missing tensors: classifier\.bias"):
        load(tmp_path / "embedding", entry("reranker_v1"))
    write_reranker_v2(tmp_path / "v2")
    with pytest.raises(CheckpointError, match="looks like 'reranker_v2'"):
        load(tmp_path / "v2", entry("reranker_v1"))


@pytest.mark.parametrize("name", ["classifier.out_proj.weight", "roberta.emb_ln.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = write_reranker_v2(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name.removeprefix("roberta.").replace(".", r"\.")):
        load(tmp_path, entry("reranker_v2"))


def test_warm_up_runs(tmp_path: Path) -> None:
    write_reranker_v1(tmp_path)
    load(tmp_path, entry("reranker_v1")).warm_up()

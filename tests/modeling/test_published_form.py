"""The tiny checkpoints of the tests have the form of the published ones: names, shapes, dtypes, to the byte.

Made in the published sizes, without numbers, their files have the published lengths. So what the loaders
are tested with differs from what is published in its sizes only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import Random, Tensors
from tests.text_checkpoints import (
    colbert_v1_tensors,
    colbert_v2_tensors,
    jina_bert_config,
    jina_bert_tensors,
    reranker_v1_tensors,
    reranker_v2_config,
    reranker_v2_tensors,
    v3_config,
    write_model,
    xlm_rotary_config,
    xlm_rotary_tensors,
)

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 61056}

Make = Callable[["Shapes"], Tensors]


class Shapes(Random):
    """Tensors that have a shape and no numbers."""

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(*shape, device="meta")


def jina_bert(vocabulary: int, *, query_norm: bool = False) -> Make:
    config = jina_bert_config(**BASE, vocab_size=vocabulary)
    return lambda shapes: jina_bert_tensors(config, query_norm=query_norm, random=shapes)


def v3(shapes: Shapes) -> Tensors:
    return xlm_rotary_tensors(v3_config(**LARGE, vocab_size=250002), random=shapes)


def colbert_v1(shapes: Shapes) -> Tensors:
    return colbert_v1_tensors(jina_bert_config(**BASE, vocab_size=30528), random=shapes)


def colbert_v2(shapes: Shapes) -> Tensors:
    return colbert_v2_tensors(xlm_rotary_config(**LARGE, vocab_size=250004), random=shapes)


def reranker_v1(layers: int) -> Make:
    config = jina_bert_config(**SMALL, num_hidden_layers=layers)
    return lambda shapes: reranker_v1_tensors(config, random=shapes)


def reranker_v2(shapes: Shapes) -> Tensors:
    config = reranker_v2_config(**BASE, vocab_size=250002, max_position_embeddings=1026)
    return reranker_v2_tensors(config, random=shapes)


def file_size(tensors: Tensors, dtype: str) -> int:
    """Length of the file that safetensors writes, by its format: a length, a header, the numbers."""
    size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + math.prod(tensors[name].shape) * size
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    written = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-written // 8) * 8 + end


@pytest.mark.parametrize(
    ("make", "dtype", "size"),
    [
        pytest.param(jina_bert(30528), "F16", 274_757_256, id="v2-base-en"),
        pytest.param(jina_bert(61056), "F16", 321_648_328, id="v2-base-de, -es, -zh"),
        pytest.param(jina_bert(61056, query_norm=True), "F16", 321_767_312, id="v2-base-code"),
        pytest.param(v3, "BF16", 1_144_685_320, id="v3"),
        pytest.param(colbert_v1, "F32", 549_888_200, id="colbert-v1-en"),
        pytest.param(reranker_v1(4), "F16", 66_100_210, id="reranker-v1-tiny-en"),
        pytest.param(reranker_v1(6), "BF16", 75_554_746, id="reranker-v1-turbo-en"),
    ],
)
def test_a_file_of_published_sizes_has_the_published_length(make: Make, dtype: str, size: int) -> None:
    assert file_size(make(Shapes()), dtype) == size


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        pytest.param(jina_bert(30528), 137_368_320, id="v2-base-en"),
        pytest.param(jina_bert(61056), 160_813_824, id="v2-base-de, -es, -zh"),
        pytest.param(jina_bert(61056, query_norm=True), 160_869_120, id="v2-base-code"),
        pytest.param(v3, 572_310_396, id="v3"),
        pytest.param(colbert_v2, 559_497_216, id="colbert-v2"),
        pytest.param(reranker_v1(4), 33_046_273, id="reranker-v1-tiny-en"),
        pytest.param(reranker_v1(6), 37_771_777, id="reranker-v1-turbo-en"),
        pytest.param(reranker_v2, 278_437_633, id="reranker-v2"),
    ],
)
def test_there_are_as_many_parameters_as_published(make: Make, parameters: int) -> None:
    assert sum(math.prod(tensor.shape) for tensor in make(Shapes()).values()) == parameters


def test_v3_has_492_tensors() -> None:
    assert len(v3(Shapes())) == 492


DTYPES = {
    "jina-embeddings-v2-base-en": "F16",
    "jina-embeddings-v2-base-code": "F16",
    "jina-embeddings-v3": "BF16",
    "jina-colbert-v1-en": "F32",
    "jina-colbert-v2": "BF16",
    "jina-reranker-v1-tiny-en": "F16",
    "jina-reranker-v2-base-multilingual": "BF16",
}


@pytest.mark.parametrize(("model", "dtype"), DTYPES.items())
def test_what_is_written_is_that_form(tmp_path: Path, model: str, dtype: str) -> None:
    path = write_model(tmp_path, model) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        assert {each.get_dtype() for each in slices.values()} == {dtype}
        shapes: Mapping[str, torch.Tensor] = {
            name: torch.empty(*each.get_shape(), device="meta") for name, each in slices.items()
        }
    written = path.stat().st_size
    metadata = len('"__metadata__":{"format":"pt"},')  # which save_file leaves out
    assert written <= file_size(dict(shapes), dtype) <= written + metadata + 8

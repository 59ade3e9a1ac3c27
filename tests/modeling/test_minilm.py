"""The real all-MiniLM-L6-v2."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import minilm_directory, minilm_spec

HELLO_WORLD = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
TEXTS = [
    "hello world",
    "",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "Ein Satz auf Deutsch, naïve café, 東京, 🦊.",
    "word " * 100,
    "a longer text about search, embeddings and rerankers " * 60,
]


def load(dtype: torch.dtype) -> TextEncoder:
    return load_text_encoder(minilm_spec(), minilm_directory(), device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def fp32() -> TextEncoder:
    return load(torch.float32)


def unit(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    items = [EncodeItem(t.ids) for t in encoder.tokenizer.encode_batch(texts, truncate_to=512)]
    vectors = np.stack([np.asarray(v) for v in encoder.forward(items)])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_golden_vector(fp32: TextEncoder) -> None:
    (vector,) = unit(fp32, ["hello world"])
    assert vector.shape == (384,)
    assert vector[:5] == pytest.approx(HELLO_WORLD, abs=1e-4)


@pytest.mark.usefixtures("backend")
def test_bf16_stays_within_cosine_0_9995_of_fp32(fp32: TextEncoder) -> None:
    cosines = (unit(load(torch.bfloat16), TEXTS) * unit(fp32, TEXTS)).sum(axis=1)
    assert cosines.min() > 0.9995


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.9999)])
def test_batched_equals_single(dtype: torch.dtype, least: float) -> None:
    encoder = load(dtype)
    together = unit(encoder, TEXTS)
    alone = np.concatenate([unit(encoder, [text]) for text in TEXTS])
    assert (together * alone).sum(axis=1).min() > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_weights(dtype: torch.dtype) -> None:
    encoder = load(dtype)
    texts = [f"text number {i} " * (i % 40 + 1) for i in range(40)]
    wanted = unit(encoder, texts)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda text: unit(encoder, [text])[0], texts * 3))
    assert (np.stack(got) * np.concatenate([wanted] * 3)).sum(axis=1).min() > 0.9999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.9995)])
def test_cuda_gives_the_vectors_of_the_cpu(fp32: TextEncoder, dtype: torch.dtype, least: float) -> None:
    encoder = load_text_encoder(minilm_spec(), minilm_directory(), device=torch.device("cuda"), dtype=dtype)
    encoder.warm_up()
    assert (unit(encoder, TEXTS) * unit(fp32, TEXTS)).sum(axis=1).min() > least

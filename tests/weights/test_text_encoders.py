"""Numbers published with or about the real weights, from ``SF_MODEL_DIR`` or the Hugging Face cache.

Sources: the models' cards; the tests of transformers, text-embeddings-inference and fastembed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.catalog.weights import WeightsNotFound, locate
from services.core.inference import finish
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, TextEncoder
from services.core.settings import Settings

pytestmark = pytest.mark.weights

V3, COLBERT_V2 = "jina-embeddings-v3", "jina-colbert-v2"
CODE = "jina-embeddings-v2-base-code"
V1_TINY, V1_TURBO = "jina-reranker-v1-tiny-en", "jina-reranker-v1-turbo-en"
V2 = "jina-reranker-v2-base-multilingual"

HELLO_WORLD = {
    "all-MiniLM-L6-v2": (-0.034478, 0.03102, 0.00673, 0.02611, -0.039362),
    "jina-embeddings-v2-base-en": (-0.0332, -0.0509, 0.0287, -0.0043, -0.0077),
    "jina-embeddings-v2-base-de": (-0.0085, 0.0417, 0.0342, 0.0309, -0.0149),
    "jina-embeddings-v2-base-code": (0.0145, -0.0164, 0.0136, -0.0170, 0.0734),
    "jina-embeddings-v2-base-zh": (0.0381, 0.0286, -0.0231, 0.0052, -0.0151),
    "jina-embeddings-v2-base-es": (-0.0108, -0.0092, -0.0373, 0.0171, -0.0301),
}
"""First numbers of the unit vector of "hello world"."""

V3_IDS = (0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2)
V3_STATES = {
    None: ((-2.1561, 1.8075, -0.1943), (-2.0813, 1.9855, -0.2760), (-2.1181, 2.0043, -0.1322)),
    "retrieval.query": ((-1.5202, 2.4074, -0.9706), (-1.5279, 2.4025, -1.1237), (-1.5252, 2.6143, -0.9416)),
    "retrieval.passage": (
        (-1.0778, 1.8124, -0.8223),
        (-1.3796, 1.8108, -0.9868),
        (-1.1073, 1.9459, -0.8104),
    ),
    "separation": ((-2.3134, 1.9034, 0.1885), (-2.1804, 1.9923, 0.1184), (-2.2325, 2.0251, 0.2533)),
    "classification": ((-1.9793, 2.2602, -0.1800), (-1.8780, 2.2660, -0.2182), (-1.9202, 2.4457, -0.0002)),
    "text-matching": ((-1.6952, 1.8568, -0.2258), (-1.6239, 1.9056, -0.2681), (-1.5218, 1.8185, 0.0062)),
}
"""Rows and columns 1 to 3 of the last hidden states of ``V3_IDS``, whose first token nobody attends to."""

V3_VECTORS = {
    "retrieval.query": (
        (0.0623, -0.0402, 0.1706, -0.0143, 0.0617),
        (-0.1064, -0.0733, 0.0353, 0.0096, 0.0667),
    ),
    "retrieval.passage": (
        (0.0513, -0.0247, 0.1751, -0.0075, 0.0679),
        (-0.0987, -0.0786, 0.09, 0.0087, 0.0577),
    ),
    "separation": ((0.094, -0.1065, 0.1305, 0.0547, 0.0556), (0.0315, -0.1468, 0.065, 0.0568, 0.0546)),
    "classification": ((0.0606, -0.0877, 0.1384, 0.0065, 0.0722), (-0.0502, -0.119, 0.032, 0.0514, 0.0689)),
    "text-matching": ((0.0911, -0.0341, 0.1305, -0.026, 0.0576), (-0.1432, -0.05, 0.0133, 0.0464, 0.0789)),
}
"""First numbers of the unit vectors of two texts by adapter, without any instruction."""

COLBERT_DOCUMENT = (
    (0.0744, 0.0590, -0.2404, -0.1776, 0.0198),
    (0.1318, 0.0882, -0.1136, -0.2065, 0.1461),
    (-0.0178, -0.1359, -0.0136, -0.1075, -0.0509),
    (0.0004, -0.1198, -0.0696, -0.0482, -0.0650),
    (0.0766, 0.0448, -0.2344, -0.1829, 0.0061),
)
COLBERT_QUERY = {
    0: (0.0475, 0.0250, -0.2225, -0.1087, -0.0297),
    1: (0.0211, -0.0844, -0.0070, -0.1715, 0.0154),
    4: (0.0477, 0.0250, -0.2279, -0.1128, -0.0289),
    5: (0.0597, -0.0676, -0.0955, -0.0756, 0.0234),
    31: (0.0205, -0.0859, -0.0385, -0.1231, -0.0331),
}
"""First numbers of the unit vectors of "Hello World", of the query by position."""

FRANCE = (
    "What is the capital of France?",
    ("Paris is the capital of France.", "Berlin is the capital of Germany."),
)
LOGITS = {V1_TINY: (2.5911, 0.1122), V1_TURBO: (1.8295, -2.8908), V2: (1.6533, -1.6455)}


@lru_cache(maxsize=1)
def network(model: str) -> TextEncoder | CrossEncoder:
    spec = Catalog.load().require(model)
    try:
        directory = locate(spec, Settings())
    except WeightsNotFound as missing:
        pytest.skip(str(missing))
    return load_network(spec, directory, device=torch.device("cpu"), dtype=torch.float32)


def encoder(model: str) -> TextEncoder:
    found = network(model)
    assert not isinstance(found, CrossEncoder)
    return found


def reranker(model: str) -> CrossEncoder:
    found = network(model)
    assert isinstance(found, CrossEncoder)
    return found


def vectors(model: str, *texts: str, adapter: str | None = None) -> np.ndarray:
    loaded = encoder(model)
    items = [EncodeItem(each.ids, adapter) for each in loaded.tokenizer.encode_batch(texts)]
    return finish(np.stack(loaded.forward(items)))  # type: ignore[arg-type]


def logit(score: float) -> float:
    return math.log(score / (1 - score))


@pytest.mark.parametrize("model", HELLO_WORLD)
def test_the_vector_of_hello_world(model: str) -> None:
    np.testing.assert_allclose(vectors(model, "hello world")[0, :5], HELLO_WORLD[model], atol=1e-3)


def test_a_question_about_code_and_its_answer() -> None:
    question = "How do I access the index while iterating over a sequence with a for loop?"
    answer = "# Use the built-in enumerator\nfor idx, x in enumerate(xs):\n    print(idx, x)"
    first, second = vectors(CODE, question, answer)
    assert float(first @ second) == pytest.approx(0.72817, abs=1e-3)


@pytest.mark.parametrize("task", V3_STATES)
def test_hidden_states_of_v3(task: str | None) -> None:
    ids = np.array(V3_IDS[1:], np.int32)
    spans = tuple((i, i + 1) for i in range(3))
    (states,) = encoder(V3).forward([EncodeItem(ids, task, spans)])
    np.testing.assert_allclose(np.asarray(states)[:, 1:4], V3_STATES[task], atol=2e-3)


@pytest.mark.parametrize("task", V3_VECTORS)
def test_vectors_of_v3(task: str) -> None:
    found = vectors(V3, "Hello World", "Follow the white rabbit.", adapter=task)
    np.testing.assert_allclose(found[:, :5], V3_VECTORS[task], atol=2e-3)


def test_token_vectors_of_colbert() -> None:
    loaded = encoder(COLBERT_V2)
    (document,) = loaded.tokenizer.encode_batch(["Hello World"])
    (query,) = loaded.query_tokenizer.encode_batch(["Hello World"])
    found, asked = (
        finish(each) for each in loaded.forward([EncodeItem(document.ids), EncodeItem(query.ids)])
    )  # type: ignore[arg-type]
    np.testing.assert_allclose(found[:, :5], COLBERT_DOCUMENT, atol=2e-3)
    np.testing.assert_allclose(asked[list(COLBERT_QUERY), :5], list(COLBERT_QUERY.values()), atol=2e-3)


@pytest.mark.parametrize("model", LOGITS)
def test_logits_of_the_rerankers(model: str) -> None:
    loaded = reranker(model)
    query, documents = FRANCE
    pairs = loaded.tokenizer.pairs(loaded.tokenizer.query(query), documents)
    scores = loaded.forward([EncodeItem(pair.windows[0]) for pair in pairs])
    np.testing.assert_allclose([logit(score) for score in scores], LOGITS[model], atol=5e-3)


def test_a_single_sequence_by_the_tiny_reranker() -> None:
    loaded = reranker(V1_TINY)
    (tokens,) = loaded.tokenizer.plain.encode_batch(["What is Deep Learning?"])
    (score,) = loaded.forward([EncodeItem(tokens.ids)])
    assert logit(score) == pytest.approx(-0.6045344, abs=1e-3)


def test_the_card_of_the_multilingual_reranker() -> None:
    loaded = reranker(V2)
    query = loaded.tokenizer.query("Organic skincare products for sensitive skin")
    documents = [
        "Organic skincare for sensitive skin with aloe vera and chamomile.",
        "New makeup trends focus on bold colors and innovative techniques",
    ]
    scores = loaded.forward([EncodeItem(p.windows[0]) for p in loaded.tokenizer.pairs(query, documents)])
    np.testing.assert_allclose(scores, (0.8311, 0.0940), atol=3e-3)

"""The learner: its steps against a plain transcription, its accuracy against scikit-learn's."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from services.classify.learner import AGGRESSIVENESS, LabelWeights, LearningStoppedError, learn
from services.core.call import Call
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine, finish
from tests.classify.tickets import split, tickets
from tests.rig import MINILM, settings


def clouds(count: int, labels: int, width: int = 24, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around one centre per label."""
    chance = np.random.default_rng(3)
    centres = chance.normal(size=(labels, width))
    targets = chance.integers(0, labels, count)
    vectors = centres[targets] + spread * np.sqrt(width) * chance.normal(size=(count, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), targets


def reference(head: LabelWeights, vectors: np.ndarray, targets: np.ndarray, iterations: int) -> np.ndarray:
    """The same learner with the weights themselves, step by step, in float64."""
    examples = vectors.astype(np.float64) - head.centre
    examples /= np.linalg.norm(examples, axis=1, keepdims=True)
    weights = head.weights.astype(np.float64)
    total = np.zeros_like(weights)
    chance = np.random.default_rng(0)
    for _ in range(iterations):
        for i in chance.permutation(len(examples)):
            x, t = examples[i], targets[i]
            violation = np.maximum(0.0, 1.0 - weights[t] @ x + weights @ x)
            violation[t] = 0.0
            if violation.sum() > 0:
                shares = violation / violation.sum()
                direction = -shares
                direction[t] = 1.0
                size = min(AGGRESSIVENESS, violation @ shares / ((x @ x) * (direction @ direction)))
                weights += size * np.outer(direction, x)
            total += weights
    return total / (iterations * len(examples))


def right(head: LabelWeights, vectors: np.ndarray, targets: np.ndarray) -> float:
    """Part of the vectors that fall under their label."""
    return float((head.decide(vectors).argmax(axis=1) == targets).mean())


@pytest.mark.parametrize("iterations", [1, 7])
def test_agrees_with_a_plain_transcription(iterations: int) -> None:
    vectors, targets = clouds(60, 5)
    start = LabelWeights(
        vectors.mean(axis=0), np.random.default_rng(1).normal(size=(5, 24)).astype(np.float32) / 10
    )
    head = learn(start, vectors, targets, iterations)
    assert head.weights.dtype == np.float32
    assert head.weights == pytest.approx(reference(start, vectors, targets, iterations), abs=1e-4)


def test_is_the_same_every_time_and_leaves_its_start_alone() -> None:
    vectors, targets = clouds(100, 6)
    start = LabelWeights.new(vectors, 6)
    first, second = (learn(start, vectors, targets, 5) for _ in range(2))
    assert first.matrix().tobytes() == second.matrix().tobytes()
    assert not start.weights.any()


def test_stopping_early_changes_nothing() -> None:
    """Passes without a change are left out; the mean must still count them."""
    vectors, targets = clouds(30, 3, spread=0.02)
    start = LabelWeights.new(vectors, 3)
    expected = reference(start, vectors, targets, 300)
    assert learn(start, vectors, targets, 300).weights == pytest.approx(expected, abs=1e-4)


def test_survives_being_written() -> None:
    vectors, targets = clouds(40, 3)
    head = learn(LabelWeights.new(vectors, 3), vectors, targets, 3)
    assert (LabelWeights.from_matrix(head.matrix()).decide(vectors) == head.decide(vectors)).all()


def test_learns_what_can_be_told_apart() -> None:
    vectors, targets = clouds(200, 16, spread=0.1)
    assert right(learn(LabelWeights.new(vectors, 16), vectors, targets, 10), vectors, targets) == 1.0


def test_later_examples_of_one_label_alone_leave_the_others_usable() -> None:
    vectors, targets = clouds(200, 5, spread=0.1)
    old, new = targets < 4, targets == 4
    start = learn(LabelWeights.new(vectors[old], 4), vectors[old], targets[old], 10)
    head = learn(start.widened(5), vectors[new], targets[new], 10)
    assert right(head, vectors[old], targets[old]) > 0.9
    assert right(head, vectors[new], targets[new]) == 1.0


def test_examples_that_are_all_alike_do_no_harm() -> None:
    vectors = np.full((2, 4), 0.5, np.float32)
    targets = np.array([0, 1])
    head = learn(LabelWeights.new(vectors, 2), vectors, targets, 3)
    assert np.isfinite(head.matrix()).all()
    assert np.isfinite(learn(head, vectors[:1], targets[1:], 3).decide(vectors)).all()


def test_stops_when_nobody_waits() -> None:
    vectors, targets = clouds(20, 3)
    stop = threading.Event()
    stop.set()
    with pytest.raises(LearningStoppedError):
        learn(LabelWeights.new(vectors, 3), vectors, targets, 10, stop)


async def test_at_least_as_accurate_as_scikit_learn() -> None:
    """Over ten ways to split the task, with 10, 20 and 30 examples of each label."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn's own imports and plans
        from sklearn.linear_model import PassiveAggressiveClassifier
    labels = list(tickets())
    assert all(len(texts) == 40 for texts in tickets().values())
    vectors = await _embedded()
    for shots in (10, 20, 30):
        ours: list[float] = []
        theirs: list[float] = []
        for seed in range(10):
            learned, held_out = split(shots, seed)
            known = np.stack([vectors[text] for text, _ in learned])
            asked = np.stack([vectors[text] for text, _ in held_out])
            targets = np.array([labels.index(label) for _, label in learned])
            truth = np.array([labels.index(label) for _, label in held_out])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rival = PassiveAggressiveClassifier(random_state=seed).fit(known, targets)
            ours.append(right(learn(LabelWeights.new(known, len(labels)), known, targets, 10), asked, truth))
            theirs.append(float((rival.predict(asked) == truth).mean()))
        assert np.mean(ours) >= np.mean(theirs), (shots, np.mean(ours), np.mean(theirs))
        assert np.mean(ours) > 0.85


async def _embedded() -> dict[str, np.ndarray]:
    engine = await Engine.start(settings(), Catalog.load())
    try:
        texts = [text for some in tickets().values() for text in some]
        embedded = await engine.embedder(MINILM).embed(texts, EmbedOptions(), Call("test"))
    finally:
        await engine.stop(5.0)
    return dict(zip(texts, finish(embedded.vectors), strict=True))


async def test_a_new_kind_of_question_does_not_hide_the_known_ones() -> None:
    labels = list(tickets())
    vectors = await _embedded()
    learned, held_out = split(20, seed=1)
    asked = np.stack([vectors[text] for text, _ in held_out])
    truth = np.array([labels.index(label) for _, label in held_out])

    def examples(of: Callable[[str], bool]) -> tuple[np.ndarray, np.ndarray]:
        chosen = [(vectors[text], labels.index(label)) for text, label in learned if of(label)]
        return np.stack([vector for vector, _ in chosen]), np.array([place for _, place in chosen])

    first = examples(lambda label: label != labels[3])
    later = examples(lambda label: label == labels[3])
    head = learn(LabelWeights.new(first[0], 3), *first, 10)
    assert right(learn(head.widened(4), *later, 10), asked, truth) > 0.8

"""The small parts: the cache, the tiled product, ids, softmax."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.classify.schema import model_mark, new_id, owner_uuid, parse_id
from services.classify.scores import best, product, similarities, softmax
from services.classify.zero_shot import ByteCache


def test_the_cache_keeps_what_was_used_last() -> None:
    cache: ByteCache[str, int] = ByteCache(30)
    for number, key in enumerate("abc"):
        cache.put(key, number, 10)
    assert cache.get("a") == 0
    cache.put("d", 3, 10)
    assert [cache.get(key) for key in "abcd"] == [0, None, 2, 3]
    assert (len(cache), cache.size) == (3, 30)


def test_the_cache_counts_bytes() -> None:
    cache: ByteCache[str, str] = ByteCache(30)
    cache.put("a", "old", 10)
    cache.put("a", "new", 25)
    assert (cache.get("a"), cache.size) == ("new", 25)
    cache.put("huge", "x", 31)
    assert (cache.get("huge"), cache.get("a")) == (None, "new")
    cache.drop("a")
    assert (len(cache), cache.size) == (0, 0)


def test_a_cache_without_room_keeps_nothing() -> None:
    cache: ByteCache[str, str] = ByteCache(0)
    cache.put("a", "x", 1)
    assert cache.get("a") is None


@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 3), (16, 42, 384), (50, 130, 384), (33, 3, 20_000)]
)
def test_the_product_in_parts(rows: int, columns: int, width: int) -> None:
    chance = np.random.default_rng(0)
    left = chance.normal(size=(rows, width)).astype(np.float32)
    right = chance.normal(size=(columns, width)).astype(np.float32)
    expected = left.astype(np.float64) @ right.astype(np.float64).T
    assert product(left, right) == pytest.approx(expected, rel=1e-4, abs=1e-3)


async def test_large_products_are_the_same_beside_the_loop() -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32)
    with ThreadPoolExecutor(1) as executor:
        assert (await similarities(vectors, vectors, executor) == product(vectors, vectors)).all()


def test_softmax_holds_for_any_values() -> None:
    scores = softmax(np.array([[1.0, 1.0], [1e4, -1e4], [0.0, 1.0]], np.float32))
    assert scores == pytest.approx(np.array([[0.5, 0.5], [1.0, 0.0], [0.268941, 0.731059]]), abs=1e-6)
    assert best(scores) == [0, 0, 1]


def test_ids_tell_the_model_and_are_random_otherwise() -> None:
    ids = [new_id("all-MiniLM-L6-v2") for _ in range(100)]
    assert {each[:8] for each in ids} == {model_mark("all-MiniLM-L6-v2")}
    assert len({each[8:] for each in ids}) == 100
    assert all(uuid.UUID(each).version == 4 and parse_id(each.upper()) == each for each in ids)
    assert model_mark("jina-embeddings-v3") != model_mark("all-MiniLM-L6-v2")


@pytest.mark.parametrize("text", ["", "x", "{00000000-0000-4000-8000-000000000000}", "0" * 32, " " * 36])
def test_what_is_no_id(text: str) -> None:
    assert parse_id(text) is None


def test_owners_become_uuids() -> None:
    assert owner_uuid("key_a") == owner_uuid("key_a") != owner_uuid("key_b")
    assert uuid.UUID(owner_uuid("anonymous")).version == 5

"""What answers are made of, each part by itself: draws, text, memory, turns."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.core.call import Call, Priority
from services.core.content import Usage
from services.core.inference.blocks import BlockPool
from services.core.inference.generation import Conversation, Waiting
from services.core.inference.sampling import Sampler, Sampling
from services.core.inference.submission import NothingOpened
from services.core.inference.writing import Writer
from services.core.modeling.types import PreparedChat


def test_interactive_calls_go_before_batch_and_keys_take_turns() -> None:
    waiting = Waiting()
    for number, name in enumerate(("c1", "a1", "a2", "a3", "b1")):
        priority = Priority.BATCH if name == "c1" else Priority.INTERACTIVE
        call = Call(name, key_id=name[0], priority=priority)
        prepared = PreparedChat(np.zeros(10, np.int32), (), Usage(10))
        sampler = Sampler(Sampling(), frozenset())
        waiting.add(Conversation(call, prepared, NothingOpened(), sampler, Writer([]), 10, number, []))
    order = []
    while waiting:
        order.append(waiting.take().call.request_id)
    assert order == ["a1", "b1", "a2", "a3", "c1"]
    assert (waiting.count, waiting.tokens) == (0, 0)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    ends = frozenset({99})

    def shares(**asked: Any) -> np.ndarray:
        ids = [Sampler(Sampling(seed=s, **asked), ends).choose(logits, ()).id for s in range(4000)]
        return np.bincount(ids, minlength=4) / len(ids)

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.25, 0.15, 0.1], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.03)
    powers = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), powers / powers.sum(), atol=0.03)


def test_penalties_and_probabilities() -> None:
    logits, ends = np.array([2.0, 1.5, 0.0], np.float32), frozenset({99})
    assert Sampler(Sampling(presence_penalty=0.6), ends).choose(logits, [0]).id == 1
    assert Sampler(Sampling(frequency_penalty=0.2), ends).choose(logits, [0, 0]).id == 0
    assert Sampler(Sampling(frequency_penalty=0.2), ends).choose(logits, [0, 0, 0]).id == 1
    chosen = Sampler(Sampling(top_logprobs=2), ends).choose(logits, ())
    expected = logits - np.log(np.exp(logits).sum())
    assert chosen.id == 0
    assert [id for id, _ in chosen.likely] == [0, 1]
    np.testing.assert_allclose([chosen.logprob, chosen.likely[1][1]], expected[:2], rtol=1e-6)


def test_pieces_of_characters_join_to_the_whole() -> None:
    written = "a🎉é\x00b".encode() + b"\xf0\x9f" + b"\xff" + b"z" + b"\xe2\x82"
    writer = Writer([bytes([byte]) for byte in range(256)])
    pieces = [writer.add(byte) for byte in written]
    assert "".join(pieces) + writer.finish() == written.decode(errors="replace")
    assert "🎉" in pieces


def test_blocks_are_shared_kept_and_taken_back() -> None:
    pool = BlockPool(4)
    first = pool.take([], 3)
    assert first is not None
    for block, key in zip(first, (b"a", b"b"), strict=False):
        pool.name(block, key)
    second = pool.take(pool.shared([b"a", b"b", b"c"]), 1)
    assert second is not None
    assert second[:2] == first[:2]
    assert pool.available == 0
    assert pool.take([], 1) is None
    pool.release(first)
    assert pool.available == 1
    pool.release(second)
    assert pool.available == 4
    assert pool.shared([b"a", b"b"]) == first[:2]
    assert pool.take([], 4) is not None
    assert pool.shared([b"a"]) == []

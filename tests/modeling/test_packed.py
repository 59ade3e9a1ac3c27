"""Laying items out behind one another, and cutting them into passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.core.modeling.layers.packed import AdapterRun, Group, Limits, pack, split
from services.core.modeling.types import EncodeItem


def item(first: int, length: int, adapter: str | None = None) -> EncodeItem:
    return EncodeItem(np.arange(first, first + length, dtype=np.int32), adapter)


LIMITS = Limits(vocabulary=1000, positions=100, adapters=frozenset({"a", "b"}))


def test_equal_lengths_become_neighbours_and_the_order_is_kept(cpu: torch.device) -> None:
    batch = pack([item(0, 3), item(10, 1), item(20, 3), item(30, 2)], cpu, LIMITS)
    assert batch.token_ids.tolist() == [10, 30, 31, 0, 1, 2, 20, 21, 22]
    assert batch.positions().tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2]
    assert batch.cu_lengths.tolist() == [0, 1, 3, 6, 9]
    assert batch.order == (1, 3, 0, 2)
    assert batch.groups == (Group(0, 1, 1), Group(1, 1, 2), Group(3, 2, 3))
    assert (batch.tokens, batch.max_length, batch.lengths) == (9, 3, (1, 2, 3, 3))


def test_items_of_one_adapter_are_neighbours(cpu: torch.device) -> None:
    batch = pack([item(0, 2, "b"), item(0, 1), item(0, 3, "a"), item(0, 2, "a")], cpu, LIMITS)
    assert batch.adapter_runs == (AdapterRun(0, 1, None), AdapterRun(1, 6, "a"), AdapterRun(6, 8, "b"))
    assert batch.order == (1, 3, 2, 0)


def test_a_batch_of_nothing_is_refused(cpu: torch.device) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        pack([], cpu, LIMITS)


def test_passes_hold_at_most_the_tokens_or_one_item() -> None:
    lengths = [40, 5, 90, 5, 30, 30, 200, 1]
    passes = split([item(0, length) for length in lengths], 64)
    assert sorted(i for part in passes for i in part) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= 64 or len(part) == 1 for part in passes)
    assert [[lengths[i] for i in part] for part in passes] == [[1, 5, 5, 30], [30], [40], [90], [200]]


def test_no_item_makes_no_pass() -> None:
    assert split([], 64) == []

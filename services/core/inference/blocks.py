"""Who holds which block of keys and values: sequences share those of a beginning that they have in common."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Key = bytes
"""Names the tokens of a block and all before it."""


class BlockPool:
    """The blocks of one cache. Used on the event loop.

    A block is held by one sequence or several. One that nobody holds any more but whose content has a key
    stays as it is until its room is needed, the longest unused first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: list[Key | None] = [None] * count
        self._by_key: dict[Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many blocks can be had."""
        return len(self._free) + len(self._kept)

    def shared(self, keys: Iterable[Key]) -> list[int]:
        """Return the blocks of the longest beginning of ``keys`` that is there. They are not held yet."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, shared: Sequence[int], fresh: int) -> list[int] | None:
        """Hold ``shared`` blocks and ``fresh`` others; None, with nothing held, if there are too few."""
        idle = sum(1 for block in shared if self._holders[block] == 0)
        if self.available - idle < fresh:
            return None
        for block in shared:
            self._holders[block] += 1
            self._kept.pop(block, None)
        taken = [self._one() for _ in range(fresh)]
        return [*shared, *taken]

    def name(self, block: int, key: Key) -> None:
        """Say what a block holds, all of it computed. Of two with the same content the first is found."""
        if key not in self._by_key and self._keys[block] is None:
            self._keys[block] = key
            self._by_key[key] = block

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of blocks, those of the end first: a beginning is of more use than what follows it."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def _one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._by_key[key]
            self._keys[block] = None
        self._holders[block] = 1
        return block


def block_key(before: Key, ids: NDArray[np.int32], pictures: Iterable[tuple[int, bytes]]) -> Key:
    """Name a block by the one before it, its ids, and the pictures in it with their places."""
    name = hashlib.blake2b(before, digest_size=16)
    name.update(np.ascontiguousarray(ids, "<i4").tobytes())
    for place, digest in pictures:
        name.update(place.to_bytes(8, "little", signed=True) + digest)
    return name.digest()

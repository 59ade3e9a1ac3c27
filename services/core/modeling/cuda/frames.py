"""Passes of few tokens replayed as CUDA graphs: a launch costs the host more than such a pass costs the GPU.

A graph is bound to its sizes and addresses. So there is one for each size of a closed set, over one buffer
that the numbers of a batch are copied to; what the batch leaves of the room is rows that see nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from services.core.modeling.cuda.ops import SHORT
from services.core.modeling.cuda.recording import NotRecordedError, Recorder
from services.core.modeling.layers.packed import Frame, PackedBatch, host_numbers, place
from services.core.modeling.types import Backbone

_log = logging.getLogger(__name__)

SIZES = (
    *(16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048),
    *(2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
    *range(9216, 32769, 1024),
)
"""Tokens of a graph: steps of at most a half, from 512 on of at most a quarter and of 1,024, so that little
is computed in vain. Above, a pass keeps the GPU busy for far longer than its launches take."""

_WANTED_SHARE = 8
"""A network that is asked for few states is asked for at most one of so many tokens."""

_MOST_BYTES = 4 << 30
_LEAST_FREE = 1 << 30
"""Memory that graphs may take, and that a device must have left for another one."""


_MEAN = 128
"""Tokens of the items that stand in for those of a graph, unless they are short."""


class _Key(NamedTuple):
    tokens: int
    wanted: int
    short: bool
    tagged: bool


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    frame: Frame


class Frames:
    """The graphs of one network. Callers take turns, from the pass to the last use of its result.

    A graph is made when a batch first needs it, or beforehand by ``prepare``.
    """

    def __init__(
        self, backbone: Backbone, device: torch.device, longest: int, sizes: tuple[int, ...] = SIZES
    ) -> None:
        """``longest`` are the tokens that an item may have."""
        self._backbone = backbone
        self._device = device
        self._sizes = sizes
        self._longest = longest
        self._graphs: dict[_Key, _Graph | None] = {}
        self._numbers = torch.zeros(_room(sizes[-1]), dtype=torch.int32, device=device)
        self._recorder = Recorder(device)
        self._hidden: torch.Tensor | None = None

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        """Return the last hidden states (tokens, width) of a batch on the host, and the batch on the device.

        Both may be overwritten by the next pass.
        """
        graph = self._graph(batch)
        if graph is None:
            placed = place(batch, self._device)
            return self._backbone(placed), placed
        numbers = host_numbers(batch, graph.frame)
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)
        graph.graph.replay()
        assert self._hidden is not None
        return self._hidden[: batch.tokens], graph.frame.view(batch, self._numbers, batch.tokens)

    def prepare(self, tokens: int, seconds: float, *, wanted: bool, tagged_tokens: int = 0) -> None:
        """Make the graphs that batches of up to ``tokens`` need, the smallest first, for about so long.

        Behind them come those of batches of several tasks, of up to ``tagged_tokens``.
        """
        until = time.monotonic() + seconds
        for most, tagged in ((tokens, False), (tagged_tokens, True)):
            for key in _likely(self._sizes, wanted=wanted, tagged=tagged):
                if key.tokens > most or time.monotonic() > until:
                    break
                if key not in self._graphs:
                    self._graphs[key] = self._capture(key)

    def _graph(self, batch: PackedBatch) -> _Graph | None:
        if batch.tokens > self._sizes[-1] or batch.inserted is not None or batch.rotation is not None:
            return None
        tokens = next(size for size in self._sizes if size >= batch.tokens)
        wanted = 0
        if batch.wanted is not None:
            few = max(1, tokens // _WANTED_SHARE)
            wanted = few if len(batch.wanted) <= few else tokens
        key = _Key(tokens, wanted, batch.max_length <= SHORT, batch.tags is not None)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        return self._graphs[key]

    def _capture(self, key: _Key) -> _Graph | None:
        if self._recorder.bytes > _MOST_BYTES or self._free() < _LEAST_FREE:
            return None
        frame = Frame(key.tokens, key.wanted, tagged=key.tagged)
        batch = self._stand_in(key, frame)

        def work() -> None:
            hidden = self._backbone(batch)
            if self._hidden is None:
                self._hidden = hidden.new_empty(self._sizes[-1], hidden.shape[1])
            # One place for all graphs, so that the memory of each is free for the next.
            self._hidden[: key.tokens].copy_(hidden)

        try:
            graph, _ = self._recorder.record(work)
        except torch.OutOfMemoryError:
            return None  # launched kernel by kernel, it may still fit
        except NotRecordedError as error:
            _log.warning("passes of %d tokens are launched kernel by kernel: %s", key.tokens, error)
            return None
        return _Graph(graph, frame)

    def _free(self) -> int:
        """Bytes that can still be had on the device."""
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + held

    def _stand_in(self, key: _Key, frame: Frame) -> PackedBatch:
        """Return a batch that fills ``frame``, over the buffer."""
        length = min(key.tokens, self._longest, SHORT if key.short else _MEAN)
        lengths = [length] * (key.tokens // length)
        lengths += [key.tokens % length] if key.tokens % length else []
        bounds = np.cumsum([0, *lengths]).astype(np.int32)
        batch = PackedBatch(
            token_ids=torch.zeros(key.tokens, dtype=torch.int32),
            cu_lengths=torch.from_numpy(bounds),
            lengths=tuple(lengths),
            order=tuple(range(len(lengths))),
            adapter_runs=(),
            wanted=np.arange(key.wanted, dtype=np.int32) if key.wanted else None,
            tags=np.zeros(key.tokens, np.int32) if key.tagged else None,
        )
        numbers = host_numbers(batch, frame)
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)
        return frame.view(batch, self._numbers, key.tokens)


def _likely(sizes: tuple[int, ...], *, wanted: bool, tagged: bool) -> Iterator[_Key]:
    for tokens in sizes:
        few = max(1, tokens // _WANTED_SHARE) if wanted else 0
        yield _Key(tokens, few, True, tagged)
        if tokens > SHORT:
            yield _Key(tokens, few, False, tagged)


def _room(tokens: int) -> int:
    """Numbers that any batch of so many tokens takes."""
    return Frame(tokens, tokens, tagged=True).size(tokens)

"""Work on a device recorded once and replayed: a launch of all of it instead of one for each kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

R = TypeVar("R")

_RECORDING = threading.Lock()


class NotRecordedError(RuntimeError):
    """The work waits for the device, or does something else that cannot be recorded. The device is fine."""


def free_cached() -> None:
    """Return the memory that no tensor uses to the device.

    Waits for a recording of another thread: torch does not free memory beside one, it raises.
    """
    with _RECORDING:
        torch.cuda.empty_cache()


class Recorder:
    """Records graphs that share their memory, so that they run one after the other, never side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def record(self, work: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
        """Do and record ``work``, which must not wait for the device; returns what it returned as recorded.

        Raises NotRecordedError. ``work`` is done twice, since what libraries do at a first call cannot be
        recorded. What it returned holds the numbers of the latest replay. ``bytes`` counts the memory that
        was taken for all.
        """
        before = torch.cuda.memory_reserved(self._device)
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                work()
                result = self._recorded(graph, work)
        finally:
            # Also where it failed: what it has begun writes to buffers that the next pass may use.
            current.wait_stream(self._stream)
        self.bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph, result

    def _recorded(self, graph: torch.cuda.CUDAGraph, work: Callable[[], R]) -> R:
        with _RECORDING:
            # Other threads, with passes of other models, may go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
                graph.capture_end()
            except BaseException as error:
                with suppress(RuntimeError):
                    graph.capture_end()
                if isinstance(error, torch.AcceleratorError) and "captur" in str(error):
                    raise NotRecordedError(str(error).splitlines()[0]) from error
                raise
            return result

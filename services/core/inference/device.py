"""The device that the models of a process share, and how its workers divide the cores."""

from __future__ import annotations

import os
import sys
import threading

import torch

from services.core.cores import usable_cores
from services.core.modeling.cuda.recording import free_cached

_ALLOCATOR_COMPLAINTS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")

_MOST_CPU_WORKERS = 4
_CUDA_WORKERS = 2

_MOST_TEXT_THREADS = 16
_BUSY_CORES = 3
"""Of the host beside a CUDA device: two workers and the event loop. A core tokenises some 0.4 to 0.8 million
tokens a second; small networks take ten times that from the device."""

_BACKGROUND_NICE = 12
"""Beside a thread of the usual niceness the kernel gives one of this a sixteenth of a core."""

_NICEST = 19


class TorchDevice:
    """One torch device.

    On a CPU several workers run side by side with few threads each, since a parallel region that spans all
    cores waits for the slowest of them, which under load is one that someone else is using. A batch that is
    alone on the machine gets all cores. On CUDA two workers keep the queue of the device filled while one of
    them packs or unpacks a batch. ``text_threads`` tokenise: on a CPU as many as there are workers, beside a
    CUDA device on the cores that are left.

    On a CPU ``background`` further workers are there for work that nobody waits for. The kernel takes their
    cores away for as long as another thread of the process wants to run, in the middle of a pass: what a pass
    on CUDA, which nothing interrupts, cannot have.
    """

    def __init__(self, device: torch.device, cores: int) -> None:
        """Share ``cores`` of the host's CPUs."""
        self.torch = device
        self.on_cpu = device.type == "cpu"
        self.workers = min(cores, _MOST_CPU_WORKERS) if self.on_cpu else _CUDA_WORKERS
        self.background = self.workers if self.on_cpu else 0
        spare = min(cores - _BUSY_CORES, _MOST_TEXT_THREADS)
        self.text_threads = self.workers if self.on_cpu else max(spare, self.workers)
        self._threads_alone = max(1, cores)
        self._threads_shared = max(1, cores // self.workers)
        self._local = threading.local()

    def claim_cores(self, alone: bool) -> None:
        """Set the intra-op threads of the calling thread."""
        threads = self._threads_alone if alone else self._threads_shared
        current: int | None = getattr(self._local, "threads", None)
        if current is None:
            # The first question for the number of threads sets it from a global of torch; ask before setting.
            torch.get_num_threads()
        if threads != current:
            torch.set_num_threads(threads)
            self._local.threads = threads

    def give_way(self) -> None:
        """Let other threads go before the calling one from now on, and before those that it starts.

        Only Linux knows the niceness of a thread; elsewhere all threads stay equal.
        """
        if not sys.platform.startswith("linux"):
            return
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _BACKGROUND_NICE
        os.setpriority(os.PRIO_PROCESS, thread, min(nice, _NICEST))

    def out_of_memory(self, error: Exception) -> bool:
        """Whether ``error`` is a failed allocation; then the caches are emptied."""
        if not _is_out_of_memory(error):
            return False
        if self.torch.type == "cuda":
            free_cached()
        return True

    def lost(self, error: Exception) -> bool:
        """Whether ``error`` is a CUDA failure other than memory: the context is gone with it."""
        return isinstance(error, torch.AcceleratorError) and not _is_out_of_memory(error)


def available_cores(processes: int = 1, most: int | None = None) -> int:
    """CPUs this process may use when ``processes`` like it share the machine, or ``most`` of its cores."""
    cores = usable_cores()
    return max(1, min(cores, most or cores) // processes)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATOR_COMPLAINTS)

"""Scaling decoded pictures bit for bit as the fast processors of transformers do, which is torch's filter."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


class Scaler:
    """At most ``count`` threads that scale, one core each."""

    def __init__(self, count: int) -> None:
        # A pool of torch's threads would take the cores that the device workers have.
        self._threads = ThreadPoolExecutor(
            count, thread_name_prefix="scale", initializer=torch.set_num_threads, initargs=(1,)
        )

    async def scaled(self, pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return ``pixels`` (height, width, 3) in ``size``, a width and a height.

        When cancelled it waits for the thread, which has the pixels.
        """
        scaling = asyncio.get_running_loop().run_in_executor(self._threads, scale, pixels, size)
        try:
            return await asyncio.shield(scaling)
        except asyncio.CancelledError:
            await asyncio.wait([scaling])
            raise

    def close(self) -> None:
        """End the threads; what is being scaled is finished."""
        self._threads.shutdown(wait=False)


def scale(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale ``pixels`` (height, width, 3) to ``size``, width and height."""
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    # The channels stay last: so the filter is several times as fast, and gives the same bytes.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    made = functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return made[0].permute(1, 2, 0).contiguous().numpy()

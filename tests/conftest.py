"""For every test."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core. More threads than that would wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

"""For every test."""

from __future__ import annotations

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core. More threads than that would wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# ``tests.stack`` starts processes by fork, so that they end with this one. gRPC would restart its threads in
# the child before it execs, and sometimes aborts there. It reads this when it is first imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in the background of a shell. Processes inherit that, and some tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

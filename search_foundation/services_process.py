"""The services as a child process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence

from gateway.child import ends_with_parent
from services.core.settings import Settings


class ServicesProcess:
    """One running ``search-foundation serve``. Made by ``start``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, settings: Settings, capabilities: Sequence[str]) -> ServicesProcess:
        """Start the services on loopback, whatever the gateway listens on; their logs go where ours do.

        They get a session of their own, so that Ctrl-C reaches only us, and end when we are killed.
        """
        environment = {
            **os.environ,
            "SF_HOST": "127.0.0.1",
            "SF_GRPC_PORT": str(settings.grpc_port),
            "SF_METRICS_PORT": str(settings.metrics_port),
            # Their gateway is on this machine.
            "SF_TRUSTED_PROXIES": json.dumps([*map(str, settings.trusted_proxies), "127.0.0.0/8", "::1/128"]),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "search_foundation.cli",
            "serve",
            *capabilities,
            stdin=asyncio.subprocess.DEVNULL,
            # Standard output is ours, for the address and the key.
            stdout=sys.stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
        return cls(process)

    async def wait(self) -> int:
        """Wait until the process ends; returns its exit status."""
        return await self._process.wait()

    async def stop(self, seconds: float) -> None:
        """Let the calls in flight finish and end, by force when that takes longer than ``seconds``."""
        if self._process.returncode is not None:
            return
        # SIGINT, not SIGTERM: there is no balancer that would need time to look elsewhere.
        self._process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(self._process.wait(), seconds + 2.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

"""Standard gRPC health, per service and overall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from grpc_health.v1 import health, health_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServices:
    """The status of each service and of the process (the empty name); all move together.

    Begins as NOT_SERVING. Once ``down`` was called it stays so.
    """

    def __init__(self, service_names: Sequence[str]) -> None:
        # The package's type is incomplete: it does not name its asyncio half.
        self.servicer: Any = cast("Any", health).aio.HealthServicer()
        self.serving = False
        self._names = ("", *service_names, health.SERVICE_NAME)

    async def begin(self) -> None:
        """Announce every name as NOT_SERVING; the servicer itself would begin as SERVING."""
        await self._set(NOT_SERVING)

    async def up(self) -> None:
        """Announce SERVING."""
        await self._set(SERVING)
        self.serving = True

    async def down(self) -> None:
        """Announce NOT_SERVING, for good."""
        self.serving = False
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, status: int) -> None:
        for name in self._names:
            await self.servicer.set(name, status)

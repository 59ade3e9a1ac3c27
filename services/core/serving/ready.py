"""Readiness of this process, check by check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import ops_pb2, ops_pb2_grpc

from services.core.serving.rest import encode

if TYPE_CHECKING:
    from services.core.access import AccessControl

OK, DEGRADED, UNAVAILABLE = "ok", "degraded", "unavailable"
PING_SECONDS = 1.5
KEEP_SECONDS = 1.0
"""An answer is given again for this long: nobody needs a key to ask, and each look asks the database."""

_DISPENSABLE = frozenset({"redis", "disk"})
"""Without these calls are answered all the same, or all but those that store something."""


class ReadyServicer(ops_pb2_grpc.OpsServiceServicer):
    """Answers ``OpsService.Ready``: whether the engine serves, and what access stands on answers."""

    def __init__(self, engine_serves: Callable[[], bool], access: AccessControl) -> None:
        self._engine_serves = engine_serves
        self._access = access
        self._looking: asyncio.Task[dict[str, str]] | None = None
        self._looked_at = 0.0

    async def Ready(  # noqa: N802
        self,
        request: ops_pb2.ReadyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> httpbody_pb2.HttpBody:
        """Check everything, what lies outside at most once a second; ``status`` comes first, for the gateway.

        ``degraded`` is a process that serves without something.
        """
        if self._looking is None or time.monotonic() > self._looked_at + KEEP_SECONDS:
            self._looking = asyncio.create_task(self._look())
            self._looked_at = time.monotonic()
        checks = {"engine": OK if self._engine_serves() else UNAVAILABLE}
        checks |= await asyncio.shield(self._looking)
        failed = {name for name, value in checks.items() if value != OK}
        status = UNAVAILABLE if failed - _DISPENSABLE else DEGRADED if failed else OK
        return encode({"status": status, "checks": checks})

    async def _look(self) -> dict[str, str]:
        checks: dict[str, str] = {}
        try:
            async with asyncio.timeout(PING_SECONDS):
                pings = await self._access.ping()
        except TimeoutError:
            checks["access"] = f"{UNAVAILABLE}: no answer within {PING_SECONDS:g} s"
        else:
            for name, check in pings.items():
                checks[name] = OK if check.ok else f"{UNAVAILABLE}: {check.detail}"
        return checks

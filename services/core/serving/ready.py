"""Readiness of this process, check by check."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import ops_pb2, ops_pb2_grpc

from services.core.serving.doors import Access
from services.core.serving.rest import encode

OK, UNAVAILABLE = "ok", "unavailable"
PING_SECONDS = 1.5


class ReadyServicer(ops_pb2_grpc.OpsServiceServicer):
    """Answers ``OpsService.Ready``: whether the engine serves, and what access stands on answers."""

    def __init__(self, engine_serves: Callable[[], bool], access: Access) -> None:
        self._engine_serves = engine_serves
        self._access = access

    async def Ready(  # noqa: N802
        self,
        request: ops_pb2.ReadyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> httpbody_pb2.HttpBody:
        """Check everything now; ``status`` comes first, where the gateway looks for it."""
        checks: dict[str, Any] = {"engine": OK if self._engine_serves() else UNAVAILABLE}
        try:
            async with asyncio.timeout(PING_SECONDS):
                pings = await self._access.ping()
        except TimeoutError:
            checks["access"] = f"{UNAVAILABLE}: no answer within {PING_SECONDS:g} s"
        else:
            for name, check in pings.items():
                checks[name] = OK if check.ok else f"{UNAVAILABLE}: {check.detail}"
        status = OK if all(value == OK for value in checks.values()) else UNAVAILABLE
        return encode({"status": status, "checks": checks})

"""Readiness of this process, check by check."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import ops_pb2, ops_pb2_grpc

from services.core.serving.rest import encode

logger = logging.getLogger(__name__)

Check = Callable[[], Awaitable[bool]]
"""Says whether something this process needs answers; may raise, which counts as no."""

OK, UNAVAILABLE = "ok", "unavailable"
CHECK_SECONDS = 1.0


class ReadyServicer(ops_pb2_grpc.OpsServiceServicer):
    """Answers ``OpsService.Ready`` from named checks, which run at once, each bounded in time."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = dict(checks)

    async def Ready(  # noqa: N802
        self,
        request: ops_pb2.ReadyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> httpbody_pb2.HttpBody:
        """Run the checks; ``status`` comes first, where the gateway looks for it."""
        results = await asyncio.gather(*(_passes(name, check) for name, check in self._checks.items()))
        status = OK if all(results) else UNAVAILABLE
        checks = {
            name: OK if passed else UNAVAILABLE for name, passed in zip(self._checks, results, strict=True)
        }
        return encode({"status": status, "checks": checks})


async def _passes(name: str, check: Check) -> bool:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check()
    except Exception as error:  # noqa: BLE001 - whatever a check raises, the answer is no
        logger.warning("readiness check '%s' failed: %s", name, error or type(error).__name__)
        return False

"""Work that is done again and again until the process ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from services.core.errors import ServiceError
from services.core.storage.objects import ObjectStoreError

logger = logging.getLogger(__name__)


async def repeat(work: Callable[[], Awaitable[None]], seconds: float, closing: asyncio.Event) -> None:
    """Do ``work`` now and after every pause of ``seconds``, whatever came of it, until the event."""
    while not closing.is_set():
        try:
            # What is away tells so itself, and this is tried again.
            with suppress(ServiceError, ObjectStoreError):
                await work()
        except Exception:
            logger.exception("%s failed and is tried again", work.__qualname__)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing.wait(), seconds)

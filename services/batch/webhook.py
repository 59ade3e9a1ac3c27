"""News of a job for its owner's own server: one signed attempt at a time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from enum import Enum

from services.batch.secrets import Secrets, WebhookSecrets, signing_key
from services.core.media.connecting import Resolver, resolve
from services.core.media.errors import FetchError
from services.core.media.fetching import Fetcher, FetchLimits, shown
from services.core.settings import Settings

logger = logging.getLogger(__name__)
_LIMITS = FetchLimits(connect_seconds=5.0, idle_seconds=10.0, total_seconds=15.0)

# A receiver that is being restarted is often seen as 404 by whoever is in front of it.
_LATER = frozenset({404, 408, 409, 423, 425, 429})


class Delivery(Enum):
    """What came of an attempt; REFUSED ones would come to the same if tried again."""

    DELIVERED = "delivered"
    RETRY = "retry"
    REFUSED = "refused"


class Webhooks:
    """Posts events as Standard Webhooks describes it, under the guard of every fetch.

    The three headers are ``webhook-id``, ``webhook-timestamp`` (seconds since the epoch) and
    ``webhook-signature``: ``v1,`` and the base64 HMAC-SHA256 of ``id.timestamp.body``, once for each secret.
    """

    def __init__(
        self,
        settings: Settings,
        secrets: WebhookSecrets,
        *,
        clock: Callable[[], float] = time.time,
        resolver: Resolver = resolve,
        limits: FetchLimits = _LIMITS,
    ) -> None:
        self._secrets = secrets
        self._clock = clock
        self._fetcher = Fetcher(settings, limits=limits, resolver=resolver)

    async def check_url(self, url: str) -> str | None:
        """Say what is wrong with ``url`` as a receiver, None if nothing; connects nowhere.

        A host that cannot be looked up just now is not held against it.
        """
        try:
            await self._fetcher.check(url)
        except FetchError as error:
            return None if error.retryable else f"Webhooks cannot go to '{shown(url)}': {error.cause}."
        return None

    async def deliver(self, url: str, payload: bytes, event_id: str) -> Delivery:
        """Try once to hand over the JSON ``payload``; the receiver knows repeats by ``event_id``.

        Raises ``ServiceError`` as ``WebhookSecrets`` does.
        """
        headers = self._headers(payload, event_id, await self._secrets.current())
        try:
            status = await self._fetcher.post(url, payload, headers)
        except FetchError as error:
            outcome = Delivery.RETRY if error.retryable else Delivery.REFUSED
            logger.warning("webhook %s: %s: %s (%s)", event_id, shown(url), error.cause, outcome.value)
            return outcome
        outcome = _judge(status)
        level = logging.INFO if outcome is Delivery.DELIVERED else logging.WARNING
        logger.log(level, "webhook %s: %s answered %d (%s)", event_id, shown(url), status, outcome.value)
        return outcome

    async def close(self) -> None:
        """Close the connections."""
        await self._fetcher.aclose()

    def _headers(self, payload: bytes, event_id: str, secrets: Secrets) -> Mapping[str, str]:
        now = str(int(self._clock()))
        signed = b".".join((event_id.encode(), now.encode(), payload))
        return {
            "Content-Type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": now,
            "webhook-signature": " ".join(_signature(signing_key(secret), signed) for secret in secrets),
        }


def _judge(status: int) -> Delivery:
    if 200 <= status < 300:
        return Delivery.DELIVERED
    return Delivery.RETRY if status >= 500 or status in _LATER else Delivery.REFUSED


def _signature(key: bytes, signed: bytes) -> str:
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()

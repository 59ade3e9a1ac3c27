"""Webhooks: the secret that signs them, and telling the end of a job."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from enum import Enum

from sqlalchemy import column, select, table, update

from services.core.media.connecting import Resolver, resolve
from services.core.media.errors import FetchError
from services.core.media.fetching import Fetcher, FetchLimits, shown
from services.core.settings import ConfigurationError, Settings
from services.core.storage import Database

Secrets = tuple[str, ...]
"""The newest first; each signs."""

_PREFIX = "whsec_"
_KEY_BYTES = 32
_TABLE = table("batch_webhook_secrets", column("secrets"))


class WebhookSecrets:
    """The secrets of SF_WEBHOOK_SECRET, or those in the database, which all its processes share.

    Every method raises ``ServiceError`` SERVICE_UNAVAILABLE while a database that is needed is away.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._given = given(settings)
        self._database = database

    async def current(self) -> Secrets:
        """Give what signs now; the first secret is made when there is none."""
        if self._given:
            return self._given
        async with self._database.read() as connection:
            kept = _split((await connection.execute(select(_TABLE))).scalar_one())
        return kept or await self._change(lambda kept: kept or (_new(),))

    async def rotate(self) -> Secrets:
        """Make a new secret; the newest until now signs beside it until ``retire``."""
        return await self._change(lambda kept: (_new(), *kept[:1]))

    async def retire(self) -> Secrets:
        """Drop all but the newest secret."""
        return await self._change(lambda kept: kept[:1] or (_new(),))

    async def _change(self, change: Callable[[Secrets], Secrets]) -> Secrets:
        async with self._database.write() as connection:
            kept = (await connection.execute(select(_TABLE).with_for_update())).scalar_one()
            changed = change(_split(kept))
            await connection.execute(update(_TABLE).values(secrets=" ".join(changed)))
        return changed


def given(settings: Settings) -> Secrets:
    """Read SF_WEBHOOK_SECRET, empty when unset; raises ``ConfigurationError`` for one that cannot sign."""
    secret = settings.webhook_secret
    found = _split(secret.get_secret_value()) if secret else ()
    for each in found:
        signing_key(each)
    return found


def signing_key(secret: str) -> bytes:
    """Give the bytes that sign: behind ``whsec_`` in base64, else the word itself."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ConfigurationError("SF_WEBHOOK_SECRET: what follows whsec_ is not base64.") from error
    if not key:
        raise ConfigurationError("SF_WEBHOOK_SECRET: nothing follows whsec_.")
    return key


def _new() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()


def _split(text: str) -> Secrets:
    return tuple(text.split())


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

"""What signs webhooks: the operator's secrets, or one that is made here and kept in the database."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Callable

from sqlalchemy import column, select, table, update

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

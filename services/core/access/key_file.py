"""Keys from a file, as a Kubernetes Secret mounts it: hashed entries under ``keys``.

::

    keys:
      - id: search-team
        digest: sha256:5e88...   # what `search-foundation keys create --entry` prints
        tier: tier1
        expires: 2027-06-30
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.access.keys import KeyRecord
from services.core.settings import ConfigurationError

logger = logging.getLogger(__name__)


class _FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    name: str = ""
    tier: str | None = None
    balance: int | None = Field(None, ge=0)
    expires: datetime | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[_FileEntry, ...]


class KeyFile:
    """The keys of one YAML file, read again whenever it changes.

    A change that cannot be read is logged and the keys stay as they were.
    """

    def __init__(self, path: Path, *, tiers: Collection[str], default_tier: str, balances: bool) -> None:
        """Read the file. Raises ``ConfigurationError``; ``balances`` says whether spending can be kept."""
        self._path = path
        self._tiers = tiers
        self._default_tier = default_tier
        self._balances = balances
        self._version = self._stat()
        self._records = self._read()

    def find(self, key_digest: bytes) -> KeyRecord | None:
        """Look a key up by its digest."""
        self._refresh()
        return self._records.get(key_digest)

    def granted(self, key_id: str) -> int | None:
        """Give the balance of a key as the file has it, None for a key without one or of another place."""
        self._refresh()
        return next((found.balance for found in self._records.values() if found.id == key_id), None)

    def _refresh(self) -> None:
        try:
            version = self._stat()
            if version == self._version:
                return
            self._version = version
            self._records = self._read()
        except ConfigurationError as error:
            logger.error("%s The keys read before stay in force.", error)
        else:
            logger.info("read %d keys from %s", len(self._records), self._path)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def _read(self) -> dict[bytes, KeyRecord]:
        try:
            document = _Document.model_validate(yaml.safe_load(self._path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"Cannot read the keys file {self._path}: {error}.") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigurationError(f"Keys file {self._path}: {where}: {first['msg']}.") from error
        records = [self._record(entry) for entry in document.keys]
        if len({r.id for r in records}) < len(records) or len({r.digest for r in records}) < len(records):
            raise ConfigurationError(f"Keys file {self._path}: every id and digest must be there once.")
        return {bytes.fromhex(record.digest): record for record in records}

    def _record(self, entry: _FileEntry) -> KeyRecord:
        tier = entry.tier or self._default_tier
        if tier not in self._tiers:
            known = ", ".join(sorted(self._tiers))
            raise ConfigurationError(f"Keys file {self._path}: {entry.id}: tier '{tier}' is none of {known}.")
        if entry.balance is not None and not self._balances:
            raise ConfigurationError(
                f"Keys file {self._path}: {entry.id}: a balance needs SF_DATABASE_URL to keep what is spent."
            )
        expires = entry.expires
        if expires is not None and expires.tzinfo is None:
            expires = expires.replace(tzinfo=UTC)
        return KeyRecord(
            id=entry.id,
            digest=entry.digest.removeprefix("sha256:"),
            name=entry.name,
            tier=tier,
            created_at=0.0,
            balance=entry.balance,
            expires_at=None if expires is None else expires.timestamp(),
        )

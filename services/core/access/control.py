"""The door of this room: who calls, may they, and what do they use."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from services.core.access.directory import KeyDirectory
from services.core.access.key_file import KeyFile
from services.core.access.key_table import KeyTable
from services.core.access.keys import digest, key_of
from services.core.access.ledger import FLUSH_SECONDS, Ledger
from services.core.access.limits import NO_LIMIT, Lease, Limiter, headers
from services.core.access.local_limits import LocalLimiter
from services.core.access.metrics import KeyUsage
from services.core.access.principal import Clock, KeyLimits, Principal
from services.core.access.schema import ACCESS
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from services.core.storage import Database
from services.core.storage.disk import Disk

if TYPE_CHECKING:
    from services.core.access.shared_limits import SharedLimiter

logger = logging.getLogger(__name__)

ANONYMOUS = "anonymous"

_UNLIMITED = headers(NO_LIMIT, NO_LIMIT)


@dataclass(frozen=True, slots=True)
class Check:
    """Whether something access stands on answers; ``detail`` says why not."""

    ok: bool
    detail: str = ""


class Admission:
    """A call that was let in. Release it, whatever becomes of the call."""

    __slots__ = ("_access", "_lease", "_principal", "_released", "charged")

    def __init__(self, access: AccessControl, principal: Principal, lease: Lease | None) -> None:
        self._access = access
        self._principal = principal
        self._lease = lease
        self.charged = 0
        """Tokens that are booked and not given back."""
        self._released = False

    async def charge(self, tokens: int) -> None:
        """Book tokens before they are used; raises 429 or 403 and books none when they are too many."""
        await self._access.charge(self._principal, self._lease, tokens)
        self.charged += tokens

    def refund(self, tokens: int) -> None:
        """Give tokens that were booked for what failed on our side back to the key's balance.

        They are left out of its usage. The minute's tokens stay counted: they were asked for.
        """
        if not 0 <= tokens <= self.charged:
            raise ValueError(f"cannot refund {tokens} of {self.charged} tokens")
        self._access.refund(self._principal, tokens)
        self.charged -= tokens

    def headers(self) -> dict[str, str]:
        """Give what the key has left of its minute, with lower-case names as gRPC wants them.

        Where nothing is limited the value is 2147483647.
        """
        if self._lease is None:
            return dict(_UNLIMITED)
        return headers(self._lease.remaining_requests, self._lease.remaining_tokens)

    async def release(self) -> None:
        """Give the concurrency slot back; once is enough, more does no harm."""
        if self._released:
            return
        self._released = True
        await self._access.release(self._principal, self._lease, self.charged)


class AccessControl:
    """Authentication, limits and usage of one process."""

    def __init__(
        self,
        settings: Settings,
        *,
        limiter: LocalLimiter | SharedLimiter,
        directory: KeyDirectory | None = None,
        keys: KeyTable | None = None,
        ledger: Ledger | None = None,
        database: Database | None = None,
    ) -> None:
        """Put the parts together; ``open`` is what makes them.

        ``keys`` are those in the database, to create and revoke; ``None`` where none are.
        """
        self._limiter: Limiter = limiter
        self._shared = None if isinstance(limiter, LocalLimiter) else limiter
        self._directory = directory
        self.keys = keys
        self._ledger = ledger
        self._database = database
        self._closes_database = False
        self._disk = Disk.of(settings)
        self._ip_limit = settings.ip_requests_per_minute
        self._usage = KeyUsage()
        tier = settings.tiers[settings.default_tier]
        self._anonymous = Principal(ANONYMOUS, settings.default_tier, KeyLimits.of(tier))
        self._closing = asyncio.Event()
        self._flusher = asyncio.create_task(self._flush_often(ledger)) if ledger else None

    @classmethod
    async def open(
        cls, settings: Settings, *, database: Database | None = None, clock: Clock | None = None
    ) -> Self:
        """Open the stores of keys and limits that the settings name.

        Keys come from ``SF_KEYS_FILE`` and ``SF_DATABASE_URL``, whichever is set, or from the SQLite file
        when neither is. A database or Redis that is away now is no reason not to start. Raises
        ``ConfigurationError`` for settings or a keys file that cannot be used. A ``database`` given is
        shared and stays open on ``close``; ``clock`` is for tests.
        """
        file = key_file(settings) if settings.auth else None
        limiter = _limiter(settings, clock)
        clock = clock or Clock()
        if not settings.auth:
            return cls(settings, limiter=limiter)
        shared = database is not None
        if not uses_database(settings):
            database = None
        elif database is None:
            database = await Database.open(settings, ACCESS)
        else:
            await database.use(ACCESS)
        table = KeyTable(database) if database else None
        ledger = Ledger(table.spend, clock) if table else None
        directory = KeyDirectory(
            file=file,
            table=table,
            ledger=ledger,
            tiers=settings.tiers,
            max_age=settings.key_cache_seconds,
            clock=clock,
        )
        access = cls(
            settings, limiter=limiter, directory=directory, keys=table, ledger=ledger, database=database
        )
        access._closes_database = not shared
        return access

    async def close(self) -> None:
        """Write what is pending and close everything. Call it after the last release."""
        self._closing.set()
        if self._flusher is not None:
            await self._flusher
        if self._directory is not None:
            await self._directory.close()
        if self._shared is not None:
            await self._shared.close()
        if self._database is not None and self._closes_database:
            await self._database.close()

    async def authenticate(self, authorization: str | None, address: str | None = None) -> Principal:
        """Resolve an ``Authorization`` value; raises one of the 401 codes, or 503 while keys cannot be read.

        ``address`` is the client's, for the limit per address: it is counted first, so that wrong keys
        are slowed down too.
        """
        if self._ip_limit is not None and address:
            await self._limiter.count_address(_network(address), self._ip_limit)
        if self._directory is None:
            return self._anonymous
        principal = await self._directory.find(digest(key_of(authorization)))
        if principal is None:
            raise ServiceError(ErrorCode.AUTH_INVALID_API_KEY)
        return principal

    async def admit(self, principal: Principal) -> Admission:
        """Let a call in; raises 429 when a limit is reached and 403 when the balance is spent."""
        if principal.metered and self._ledger is not None:
            self._ledger.check(principal.key_id)
        lease = (
            await self._limiter.admit(principal.key_id, principal.limits) if principal.limits.any else None
        )
        return Admission(self, principal, lease)

    async def ping(self) -> dict[str, Check]:
        """Ask what this room stands on, for readiness: ``database`` and ``redis``, where used.

        A ``disk`` is told of while it takes nothing new.
        """
        asked: dict[str, Awaitable[None]] = {}
        if self._database is not None:
            asked["database"] = self._database.ping()
        if self._shared is not None:
            asked["redis"] = self._shared.ping()
        checks = dict(zip(asked, await asyncio.gather(*map(_check, asked.values())), strict=True))
        if await asyncio.to_thread(lambda: self._disk.low):
            checks["disk"] = Check(ok=False, detail="nearly full, nothing new is stored")
        return checks

    async def charge(self, principal: Principal, lease: Lease | None, tokens: int) -> None:
        """Book tokens of an admission; use ``Admission.charge``."""
        if tokens < 0:
            raise ValueError(f"cannot charge {tokens} tokens")
        ledger = self._ledger if principal.metered else None
        if ledger is not None:
            ledger.debit(principal.key_id, tokens)
        if lease is None:
            return
        try:
            await self._limiter.charge(lease, tokens)
        except BaseException:
            if ledger is not None:
                ledger.credit(principal.key_id, tokens)
            raise

    def refund(self, principal: Principal, tokens: int) -> None:
        """Give tokens of an admission back; use ``Admission.refund``."""
        if tokens and principal.metered and self._ledger is not None:
            self._ledger.credit(principal.key_id, tokens)

    async def release(self, principal: Principal, lease: Lease | None, charged: int) -> None:
        """End an admission; use ``Admission.release``."""
        if charged:
            self._usage.count(principal.key_id, charged)
        if lease is not None:
            await self._limiter.release(lease)

    async def _flush_often(self, ledger: Ledger) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._closing.wait()
            try:
                # The database tells of its absence itself, and what is pending stays so.
                with contextlib.suppress(ServiceError):
                    await ledger.flush()
            except Exception:
                logger.exception("cannot write what keys have spent")
        if ledger.pending:
            logger.error("lost the spending of %d tokens: the database is away", ledger.pending)


def uses_database(settings: Settings) -> bool:
    """Whether keys are (also) in the database."""
    return settings.keys_file is None or settings.database_url is not None


def key_file(settings: Settings) -> KeyFile | None:
    """Read the file of SF_KEYS_FILE, if it is set; raises ``ConfigurationError``."""
    if settings.keys_file is None:
        return None
    return KeyFile(
        settings.keys_file,
        tiers=settings.tiers,
        default_tier=settings.default_tier,
        balances=uses_database(settings),
    )


def _limiter(settings: Settings, clock: Clock | None) -> LocalLimiter | SharedLimiter:
    local = LocalLimiter(clock.monotonic) if clock else LocalLimiter()
    if settings.redis_url is None:
        return local
    # Imported here: redis takes a tenth of a second that most starts need not spend.
    from services.core.access.shared_limits import SharedLimiter, connect

    timeout = settings.redis_timeout_seconds
    client = connect(settings.redis_url.get_secret_value(), timeout)
    now_ms = functools.partial(_milliseconds, clock) if clock else None
    return SharedLimiter(client, local, timeout=timeout, now_ms=now_ms)


def _milliseconds(clock: Clock) -> int:
    return int(clock.monotonic() * 1000)


async def _check(answer: Awaitable[None]) -> Check:
    try:
        await answer
    except (ServiceError, ConnectionError) as error:
        return Check(ok=False, detail=str(error))
    return Check(ok=True)


@functools.lru_cache(maxsize=4096)
def _network(address: str) -> str:
    """Give what one client holds: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return address

"""Token balances, over both databases."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from services.core.access import AccessControl
from services.core.access.key_table import KeyTable
from services.core.access.ledger import PATIENCE_SECONDS, Ledger
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from tests.access.clock import HandClock

# Spends 10 tokens, waits until they are in the database, spends 7 more and dies.
SPENDER = """
import asyncio, os, sys
from services.core.access import AccessControl
from services.core.access.key_table import KeyTable
from services.core.settings import Settings

async def main(url, folder, key, key_id):
    access = await AccessControl.open(Settings(database_url=url or None, data_dir=folder))
    principal = await access.authenticate("Bearer " + key)
    await (await access.admit(principal)).charge(10)
    while await access.keys.spent(key_id) != 10:
        await asyncio.sleep(0.01)
    await (await access.admit(principal)).charge(7)
    os._exit(9)

asyncio.run(main(*sys.argv[1:]))
"""


async def spend(access: AccessControl, key: str, tokens: int, *, refund: bool = False) -> None:
    admission = await access.admit(await access.authenticate(f"Bearer {key}"))
    try:
        await admission.charge(tokens)
        if refund:
            admission.refund(tokens)
    finally:
        await admission.release()


async def refused(access: AccessControl, key: str, tokens: int) -> ErrorCode:
    with pytest.raises(ServiceError) as error:
        await spend(access, key, tokens)
    return error.value.code


async def test_spent_to_the_last_token_and_kept_over_a_restart(settings: Settings, table: KeyTable) -> None:
    key, record = await table.create(tier="unlimited", balance=100)
    access = await AccessControl.open(settings)
    await spend(access, key, 60)
    assert await refused(access, key, 41) is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    await access.close()
    assert await table.spent(record.id) == 60
    access = await AccessControl.open(settings)
    await spend(access, key, 40)
    assert await refused(access, key, 0) is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    await access.close()
    assert (await table.list())[0].spent == 100


async def test_never_overspent_by_calls_at_once(settings: Settings, table: KeyTable) -> None:
    key, record = await table.create(tier="tier2", balance=1_000)
    access = await AccessControl.open(settings)
    results = await asyncio.gather(*(spend(access, key, 30) for _ in range(200)), return_exceptions=True)
    assert results.count(None) == 33
    await access.close()
    assert await table.spent(record.id) == 990


async def test_a_refund_goes_back_to_the_balance(settings: Settings, table: KeyTable) -> None:
    key, record = await table.create(tier="free", balance=100)
    access = await AccessControl.open(settings)
    await spend(access, key, 100, refund=True)
    await spend(access, key, 100)
    await access.close()
    assert await table.spent(record.id) == 100


async def test_tokens_refused_by_the_minute_are_not_spent(settings: Settings, table: KeyTable) -> None:
    key, record = await table.create(tier="free", balance=10**9)
    access = await AccessControl.open(settings)
    assert await refused(access, key, 1_000_001) is ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED
    await access.close()
    assert await table.spent(record.id) == 0


async def test_a_top_up_reopens_a_spent_key(settings: Settings, table: KeyTable, clock: HandClock) -> None:
    key, record = await table.create(tier="unlimited", balance=5)
    endless, _ = await table.create(tier="unlimited")
    access = await AccessControl.open(settings, clock=clock.both)
    await spend(access, key, 5)
    assert await refused(access, key, 1) is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    assert await table.top_up(record.id, 10)
    assert not await table.top_up("key_none", 10)
    clock.forward(settings.key_cache_seconds)
    await spend(access, key, 10)
    assert await refused(access, key, 1) is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    await spend(access, endless, 10**12)
    await access.close()


async def test_two_processes_spend_one_balance(settings: Settings, table: KeyTable, clock: HandClock) -> None:
    key, record = await table.create(tier="unlimited", balance=100)
    one, two = [await AccessControl.open(settings, clock=clock.both) for _ in range(2)]
    await spend(two, key, 1)
    await spend(one, key, 80)
    await one.close()
    clock.forward(settings.key_cache_seconds)
    assert await refused(two, key, 20) is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    await spend(two, key, 19)
    await two.close()
    assert await table.spent(record.id) == 100


async def test_a_killed_process_loses_only_what_was_not_written(settings: Settings, table: KeyTable) -> None:
    key, record = await table.create(tier="unlimited", balance=100)
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    command = [sys.executable, "-c", SPENDER, url, str(settings.data_dir), key, record.id]
    assert subprocess.run(command, check=False).returncode == 9
    assert await table.spent(record.id) == 10


class Books:
    """Stands for the database: sums that can be away, or that wait to be let go."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def spend(self, tokens: dict[str, int]) -> dict[str, int]:
        if self.away:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=1.0)
        for key_id, count in tokens.items():
            self.sums[key_id] = self.sums.get(key_id, 0) + count
        await self.gate.wait()
        return {key_id: self.sums[key_id] for key_id in tokens}


async def test_what_cannot_be_written_is_kept_and_bounded(clock: HandClock) -> None:
    books = Books()
    ledger = Ledger(books.spend, clock.both)
    ledger.learn("key", granted=100, spent=0, version=ledger.version)
    books.away = True
    ledger.debit("key", 10)
    with pytest.raises(ServiceError):
        await ledger.flush()
    clock.forward(PATIENCE_SECONDS)
    ledger.debit("key", 10)
    clock.forward(0.1)
    with pytest.raises(ServiceError) as error:
        ledger.debit("key", 10)
    assert error.value.code is ErrorCode.SERVICE_UNAVAILABLE
    books.away = False
    await ledger.flush()
    ledger.debit("key", 80)
    await ledger.flush()
    assert books.sums == {"key": 100}
    assert ledger.pending == 0


async def test_flushes_at_once_write_what_is_pending_once(clock: HandClock) -> None:
    books = Books()
    ledger = Ledger(books.spend, clock.both)
    ledger.learn("key", granted=100, spent=0, version=ledger.version)
    ledger.debit("key", 60)
    books.gate.clear()
    flushes = [asyncio.create_task(ledger.flush()) for _ in range(2)]
    await asyncio.sleep(0)
    books.gate.set()
    await asyncio.gather(*flushes)
    assert books.sums == {"key": 60}
    assert ledger.pending == 0


async def test_a_sum_read_across_a_flush_counts_nothing_twice(clock: HandClock) -> None:
    books = Books()
    ledger = Ledger(books.spend, clock.both)
    ledger.learn("key", granted=100, spent=0, version=ledger.version)
    ledger.debit("key", 60)
    before = ledger.version
    books.gate.clear()
    flush = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    ledger.learn("key", granted=100, spent=books.sums["key"], version=ledger.version)
    ledger.debit("key", 40)
    books.gate.set()
    await flush
    ledger.learn("key", granted=100, spent=0, version=before)
    with pytest.raises(ServiceError) as error:
        ledger.check("key")
    assert error.value.code is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE

"""Keys in the database, as a running server sees them."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing

import pytest

from services.core.access import AccessControl
from services.core.access.key_table import KeyTable
from services.core.access.keys import new_key
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings
from tests.access.clock import HandClock


@pytest.fixture
async def access(settings: Settings, clock: HandClock) -> AsyncIterator[AccessControl]:
    access = await AccessControl.open(settings, clock=clock.both)
    yield access
    await access.close()


async def refused(access: AccessControl, authorization: str | None) -> ErrorCode:
    with pytest.raises(ServiceError) as error:
        await access.authenticate(authorization)
    return error.value.code


async def test_a_key_opens_its_tier(access: AccessControl, table: KeyTable) -> None:
    key, record = await table.create(tier="tier1", name="search")
    principal = await access.authenticate(f"Bearer {key}")
    assert (principal.key_id, principal.tier, principal.name) == (record.id, "tier1", "search")
    assert (principal.limits.requests, principal.limits.tokens, principal.limits.concurrency) == (
        500,
        10_000_000,
        50,
    )


async def test_the_three_refusals(access: AccessControl) -> None:
    assert await refused(access, None) is ErrorCode.AUTH_MISSING_API_KEY
    assert await refused(access, "Bearer nonsense") is ErrorCode.AUTH_INVALID_FORMAT
    assert await refused(access, f"Bearer {new_key()}") is ErrorCode.AUTH_INVALID_API_KEY


async def test_a_revocation_takes_effect_within_the_stated_time(
    access: AccessControl, table: KeyTable, settings: Settings, clock: HandClock
) -> None:
    key, record = await table.create(tier="free")
    await access.authenticate(f"Bearer {key}")
    assert await table.revoke(record.id)
    assert not await table.revoke(record.id)
    clock.forward(settings.key_cache_seconds)
    assert await refused(access, f"Bearer {key}") is ErrorCode.AUTH_INVALID_API_KEY


async def test_a_key_in_use_is_looked_up_again_in_the_background(
    access: AccessControl, table: KeyTable, settings: Settings, clock: HandClock
) -> None:
    key, record = await table.create(tier="free")
    await access.authenticate(f"Bearer {key}")
    await table.revoke(record.id)
    clock.forward(settings.key_cache_seconds * 0.6)
    await access.authenticate(f"Bearer {key}")
    codes: list[ErrorCode] = []
    while not codes:
        await asyncio.sleep(0.01)
        try:
            await access.authenticate(f"Bearer {key}")
        except ServiceError as error:
            codes.append(error.code)
    assert codes == [ErrorCode.AUTH_INVALID_API_KEY]


async def test_expired_keys(access: AccessControl, table: KeyTable, clock: HandClock) -> None:
    key, _ = await table.create(tier="free", expires_at=clock.now() + 2)
    past, _ = await table.create(tier="free", expires_at=clock.now() - 1)
    await access.authenticate(f"Bearer {key}")
    assert await refused(access, f"Bearer {past}") is ErrorCode.AUTH_INVALID_API_KEY
    clock.forward(2)
    assert await refused(access, f"Bearer {key}") is ErrorCode.AUTH_INVALID_API_KEY


async def test_a_new_key_opens_at_once(access: AccessControl, table: KeyTable) -> None:
    assert await refused(access, f"Bearer {new_key()}") is ErrorCode.AUTH_INVALID_API_KEY
    key, _ = await table.create(tier="free")
    await access.authenticate(f"Bearer {key}")


async def test_many_calls_at_once(access: AccessControl, table: KeyTable) -> None:
    keys = [(await table.create(tier="free"))[0] for _ in range(5)]
    wrong = [new_key() for _ in range(100)]
    headers = [f"Bearer {key}" for key in (keys * 20 + wrong)]
    results = await asyncio.gather(*map(access.authenticate, headers), return_exceptions=True)
    assert sum(isinstance(result, ServiceError) for result in results) == 100
    assert len({result.key_id for result in results if not isinstance(result, BaseException)}) == 5


async def test_a_cancelled_call_does_not_fail_the_others(access: AccessControl, table: KeyTable) -> None:
    key, record = await table.create(tier="free")
    first, second = (asyncio.create_task(access.authenticate(f"Bearer {key}")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).key_id == record.id
    assert first.cancelled()


async def test_a_tier_no_setting_describes_is_not_let_in(
    access: AccessControl, table: KeyTable, caplog: pytest.LogCaptureFixture
) -> None:
    key, _ = await table.create(tier="gone")
    assert await refused(access, f"Bearer {key}") is ErrorCode.INTERNAL_ERROR
    assert "tier 'gone'" in caplog.text


async def test_the_key_is_nowhere(
    sqlite_settings: Settings, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in the database's files nor in anything logged, found or not found, well or locked."""
    with caplog.at_level(logging.DEBUG):
        access = await AccessControl.open(
            sqlite_settings.model_copy(update={"database_timeout_seconds": 0.1})
        )
        assert access.keys is not None
        key, record = await access.keys.create(tier="free", name="x")
        unknown = new_key()
        await access.authenticate(f"Bearer {key}")
        assert await refused(access, f"Bearer {unknown}") is ErrorCode.AUTH_INVALID_API_KEY
        file = sqlite_settings.data_dir / "search-foundation.sqlite3"
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ServiceError):
                await access.keys.revoke(record.id)
        await access.close()
    written = b"".join(path.read_bytes() for path in sqlite_settings.data_dir.iterdir())
    logged = caplog.text + "".join(capfd.readouterr())
    assert record.digest.encode() in written
    assert record.digest not in logged
    for secret in (key, key[5:37], key[37:], unknown):
        assert secret.encode() not in written
        assert secret not in logged


async def test_while_the_database_is_away(sqlite_settings: Settings, clock: HandClock) -> None:
    access = await AccessControl.open(sqlite_settings, clock=clock.both)
    assert access.keys is not None
    key, _ = await access.keys.create(tier="free")
    await access.authenticate(f"Bearer {key}")
    aside = sqlite_settings.data_dir.rename(sqlite_settings.data_dir.with_name("aside"))
    await access.authenticate(f"Bearer {key}")
    assert await refused(access, f"Bearer {new_key()}") is ErrorCode.SERVICE_UNAVAILABLE
    clock.forward(10)
    assert await refused(access, f"Bearer {key}") is ErrorCode.SERVICE_UNAVAILABLE
    assert not (await access.ping())["database"].ok
    aside.rename(sqlite_settings.data_dir)
    await access.authenticate(f"Bearer {key}")
    assert (await access.ping())["database"].ok
    await access.close()


async def test_listed_keys(table: KeyTable) -> None:
    _, first = await table.create(tier="free", name="a", balance=7, expires_at=time.time() + 9)
    _, second = await table.create(tier="free", name="b")
    await table.revoke(second.id)
    listed = await table.list()
    assert listed[0] == first
    assert [record.name for record in listed] == ["a", "b"]
    assert listed[1].revoked_at is not None

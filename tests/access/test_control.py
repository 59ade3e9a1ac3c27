"""The whole door, over limits in process and in Redis."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.core.access import AccessControl, Principal
from services.core.access import metrics as access_metrics
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings, Tier
from services.core.storage import Database
from tests.servers import free_port, shared_redis

TIERS = {"small": Tier(requests_per_minute=3, tokens_per_minute=100, concurrency=2)}


@pytest.fixture(params=["local", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    redis = shared_redis().url if request.param == "redis" else None
    return Settings(data_dir=tmp_path, redis_url=redis, redis_timeout_seconds=5.0, tiers=TIERS)


@pytest.fixture
async def access(settings: Settings) -> AsyncIterator[AccessControl]:
    access = await AccessControl.open(settings)
    yield access
    await access.close()


async def principal(access: AccessControl, tier: str) -> Principal:
    assert access.keys is not None
    key, _ = await access.keys.create(tier=tier)
    return await access.authenticate(f"Bearer {key}")


async def test_a_call_from_end_to_end(access: AccessControl) -> None:
    caller = await principal(access, "small")
    admission = await access.admit(caller)
    assert admission.headers() == headers(2, 100)
    await admission.charge(30)
    await admission.charge(0)
    assert admission.headers() == headers(2, 70)
    with pytest.raises(ServiceError) as error:
        await admission.charge(71)
    assert error.value.code is ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED
    assert error.value.headers == headers(2, 70)
    await admission.release()
    assert tokens_of(caller.key_id) == 30


async def test_releasing_twice_gives_one_slot_back(access: AccessControl) -> None:
    caller = await principal(access, "small")
    first = await access.admit(caller)
    await access.admit(caller)
    await first.release()
    await first.release()
    await access.admit(caller)
    with pytest.raises(ServiceError):
        await access.admit(caller)


async def test_without_limits_the_headers_are_there_all_the_same(access: AccessControl) -> None:
    admission = await access.admit(await principal(access, "unlimited"))
    await admission.charge(10**9)
    assert admission.headers() == headers(2**31 - 1, 2**31 - 1)
    await admission.release()


async def test_refunded_tokens_are_not_usage(access: AccessControl) -> None:
    caller = await principal(access, "unlimited")
    admission = await access.admit(caller)
    await admission.charge(5)
    admission.refund(5)
    with pytest.raises(ValueError, match="cannot refund 1 of 0"):
        admission.refund(1)
    await admission.release()
    assert tokens_of(caller.key_id) is None


async def test_a_negative_charge_is_a_mistake(access: AccessControl) -> None:
    admission = await access.admit(await principal(access, "unlimited"))
    with pytest.raises(ValueError, match="cannot charge -1"):
        await admission.charge(-1)


async def test_without_authentication(settings: Settings) -> None:
    access = await AccessControl.open(
        settings.model_copy(update={"auth": False, "default_tier": "small", "data_dir": Path("/nowhere")})
    )
    assert access.keys is None
    for authorization in (None, "", "Bearer sk-whatever", "Basic x"):
        caller = await access.authenticate(authorization)
        assert (caller.key_id, caller.tier, caller.limits.requests) == ("anonymous", "small", 3)
    await access.close()


async def test_a_limit_per_address_comes_before_everything_else(settings: Settings) -> None:
    access = await AccessControl.open(settings.model_copy(update={"ip_requests_per_minute": 2}))
    net = ":".join(secrets.token_hex(2) for _ in range(4))

    async def code(address: str | None) -> ErrorCode:
        with pytest.raises(ServiceError) as error:
            await access.authenticate("Bearer wrong", address)
        return error.value.code

    assert await code(f"{net}::1") is ErrorCode.AUTH_INVALID_FORMAT
    assert await code(f"{net}::2") is ErrorCode.AUTH_INVALID_FORMAT
    assert await code(f"{net}::3") is ErrorCode.RATE_IP_LIMIT_EXCEEDED
    assert await code(None) is ErrorCode.AUTH_INVALID_FORMAT
    mapped = f"10.{secrets.randbelow(256)}.{secrets.randbelow(256)}.{secrets.randbelow(256)}"
    assert await code(mapped) is ErrorCode.AUTH_INVALID_FORMAT
    assert await code(f"::ffff:{mapped}") is ErrorCode.AUTH_INVALID_FORMAT
    assert await code(mapped) is ErrorCode.RATE_IP_LIMIT_EXCEEDED
    await access.close()


async def test_ping(settings: Settings, access: AccessControl) -> None:
    checks = await access.ping()
    assert set(checks) == ({"database", "redis"} if settings.redis_url else {"database"})
    assert all(check.ok for check in checks.values())


async def test_ping_without_redis(settings: Settings) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    access = await AccessControl.open(Settings(data_dir=settings.data_dir, redis_url=away))
    checks = await access.ping()
    assert checks["database"].ok
    assert not checks["redis"].ok
    assert checks["redis"].detail
    await access.close()


async def test_a_shared_database_stays_open(settings: Settings) -> None:
    database = await Database.open(settings)
    access = await AccessControl.open(settings, database=database)
    await principal(access, "free")
    await access.close()
    await database.ping()
    await database.close()


def test_usage_has_a_bounded_number_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_metrics, "_MAX_KEYS", 2)
    usage = access_metrics.KeyUsage()
    ids = [f"key_{secrets.token_hex(4)}" for _ in range(4)]
    others = tokens_of("other") or 0.0
    for key_id in ids * 2:
        usage.count(key_id, 5)
    assert [tokens_of(key_id) for key_id in ids] == [10, 10, None, None]
    assert tokens_of("other") == others + 20


def tokens_of(key_id: str) -> float | None:
    return REGISTRY.get_sample_value("searchfoundation_key_tokens_total", {"key_id": key_id})


def headers(requests: int, tokens: int) -> dict[str, str]:
    return {
        "x-ratelimit-remaining-requests": str(requests),
        "x-ratelimit-remaining-tokens": str(tokens),
    }

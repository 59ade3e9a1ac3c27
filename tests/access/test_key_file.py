from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.core.access import AccessControl
from services.core.access.keys import digest, new_key
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import ConfigurationError, Settings
from tests.access.clock import HandClock

KEY = f"jina_{'f1le' * 15}"
ENTRY = f"{{id: team, digest: 'sha256:{digest(KEY).hex()}'"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def settings(file: Path, tmp_path: Path) -> Settings:
    return Settings(keys_file=file, data_dir=tmp_path / "data")


async def test_keys_of_the_file_and_nothing_else(settings: Settings, file: Path, tmp_path: Path) -> None:
    file.write_text(f"keys: [{ENTRY}, tier: tier2, name: Team}}]")
    access = await AccessControl.open(settings)
    principal = await access.authenticate(f"Bearer {KEY}")
    assert (principal.key_id, principal.tier, principal.limits.requests) == ("team", "tier2", 5_000)
    with pytest.raises(ServiceError) as error:
        await access.authenticate(f"Bearer {new_key()}")
    assert error.value.code is ErrorCode.AUTH_INVALID_API_KEY
    assert await access.ping() == {}
    assert not (tmp_path / "data").exists(), "no database is made"
    await access.close()


async def test_beside_the_database(file: Path, tmp_path: Path) -> None:
    file.write_text(f"keys: [{ENTRY}, balance: 10}}]")
    settings = Settings(keys_file=file, database_url=f"sqlite:///{tmp_path}/keys.sqlite3")
    access = await AccessControl.open(settings)
    assert access.keys is not None
    stored, record = await access.keys.create(tier="free")
    assert (await access.authenticate(f"Bearer {stored}")).key_id == record.id
    admission = await access.admit(await access.authenticate(f"Bearer {KEY}"))
    await admission.charge(10)
    await admission.release()
    await access.close()
    access = await AccessControl.open(settings)
    with pytest.raises(ServiceError) as error:
        await access.admit(await access.authenticate(f"Bearer {KEY}"))
    assert error.value.code is ErrorCode.AUTHZ_INSUFFICIENT_BALANCE
    await access.close()


async def test_a_changed_file_is_read_again(
    settings: Settings, file: Path, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Changed as Kubernetes changes a mounted Secret: a link comes to lead to another folder."""
    first, second = (file.parent / name for name in ("first", "second"))
    for folder, text in ((first, f"keys: [{ENTRY}}}]"), (second, "keys: []")):
        folder.mkdir()
        (folder / "keys.yaml").write_text(text)
    (file.parent / "current").symlink_to(first)
    file.symlink_to(file.parent / "current" / "keys.yaml")
    access = await AccessControl.open(settings, clock=clock.both)
    await access.authenticate(f"Bearer {KEY}")
    (file.parent / "next").symlink_to(second)
    os.rename(file.parent / "next", file.parent / "current")
    clock.forward(settings.key_cache_seconds)
    with pytest.raises(ServiceError):
        await access.authenticate(f"Bearer {KEY}")
    (second / "keys.yaml").write_text("keys: [rubbish")
    clock.forward(settings.key_cache_seconds)
    with pytest.raises(ServiceError) as error:
        await access.authenticate(f"Bearer {KEY}")
    assert error.value.code is ErrorCode.AUTH_INVALID_API_KEY
    assert "The keys read before stay in force." in caplog.text
    await access.close()


async def test_expiry(settings: Settings, file: Path) -> None:
    file.write_text(f"keys: [{ENTRY}, expires: 2020-01-01}}]")
    access = await AccessControl.open(settings)
    with pytest.raises(ServiceError) as error:
        await access.authenticate(f"Bearer {KEY}")
    assert error.value.code is ErrorCode.AUTH_INVALID_API_KEY
    await access.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "Cannot read the keys file"),
        ("keys: [", "Cannot read the keys file"),
        ("[]", "Input should be"),
        ("keys: [{id: a b, digest: x}]", r"keys.0.id"),
        ("keys: [{id: a, digest: x}]", r"keys.0.digest"),
        (f"keys: [{{id: a, digest: '{KEY}'}}]", r"keys.0.digest"),
        (f"keys: [{ENTRY}, tear: free}}]", r"keys.0.tear"),
        (f"keys: [{ENTRY}, tier: gold}}]", "tier 'gold' is none of free"),
        (f"keys: [{ENTRY}, balance: 5}}]", "a balance needs SF_DATABASE_URL"),
        (f"keys: [{ENTRY}}}, {ENTRY}}}]", "every id and digest must be there once"),
    ],
)
async def test_an_unusable_file_stops_the_start(
    settings: Settings, file: Path, text: str | None, says: str
) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=says) as error:
        await AccessControl.open(settings)
    assert KEY not in str(error.value)

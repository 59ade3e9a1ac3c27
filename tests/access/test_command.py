"""``search-foundation keys``, through the command's own door."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import yaml

from search_foundation.cli import main
from services.core.access import AccessControl, Principal
from services.core.errors import ServiceError
from services.core.settings import Settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SF_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def opened(key: str, settings: Settings | None = None) -> Principal:
    async def authenticate() -> Principal:
        access = await AccessControl.open(settings or Settings())
        try:
            return await access.authenticate(f"Bearer {key}")
        finally:
            await access.close()

    return asyncio.run(authenticate())


def create(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["keys", "create", *options]) == 0
    return capsys.readouterr().out.strip()


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert main(["keys", "list", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_create_list_revoke(capsys: pytest.CaptureFixture[str]) -> None:
    key = create(capsys, "--name", "team a", "--tier", "tier1", "--balance", "5_000", "--expires", "30d")
    principal = opened(key)
    assert (principal.tier, principal.metered, principal.name) == ("tier1", True, "team a")
    (row,) = listed(capsys)
    assert row["id"] == principal.key_id
    assert (row["state"], row["tokens_left"]) == ("open", 5_000)
    assert main(["keys", "revoke", principal.key_id]) == 0
    assert "within 5 seconds" in capsys.readouterr().out
    assert listed(capsys)[0]["state"] == "revoked"
    with pytest.raises(ServiceError):
        opened(key)
    assert main(["keys", "revoke", principal.key_id]) == 1


def test_usage_is_told_of_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    create(capsys, "--tier", "free")
    create(capsys)
    assert main(["keys", "usage", "--json"]) == 0
    free, other = json.loads(capsys.readouterr().out)
    assert free["unfinished_jobs"] == {"used": 0, "limit": 20}
    assert other["stored_bytes"] == {"used": 0, "limit": None}
    assert main(["keys", "usage"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    for name in ("ID", "TIER", "UNFINISHED JOBS", "UNFINISHED LINES", "STORED BYTES"):
        assert name in header
    assert [("0 of 20" in row) for row in rows] == [True, False]


def test_the_table_never_shows_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    key = create(capsys)
    assert main(["keys", "list"]) == 0
    out = capsys.readouterr().out
    assert "unlimited" in out
    assert key not in out
    assert "jina_" not in out


def test_top_up(capsys: pytest.CaptureFixture[str]) -> None:
    create(capsys, "--balance", "0")
    (row,) = listed(capsys)
    assert main(["keys", "top-up", str(row["id"]), "1,000"]) == 0
    assert "1,000 tokens more" in capsys.readouterr().out
    assert listed(capsys)[-1]["tokens_left"] == 1_000
    assert main(["keys", "top-up", "key_none", "1"]) == 1
    assert "No key with a balance" in capsys.readouterr().err


def test_an_entry_for_the_keys_file(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["keys", "create", "--entry", "--name", "team a", "--tier", "free", "--expires", "2099-01-01"]
    assert main(command) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    assert key not in shown.out
    assert not (folder / "data").exists()
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": yaml.safe_load(shown.out)}))
    assert opened(key, Settings(keys_file=file)).key_id == "team-a"
    monkeypatch.setenv("SF_KEYS_FILE", str(file))
    assert main(["keys", "create"]) == 2
    assert "edit that file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tier", "gold"], "No tier 'gold'; there are: free, tier1, tier2, unlimited."),
        (["--expires", "soon"], "'soon' is neither a span"),
        (["--expires", "2001-01-01"], "has passed"),
        (["--balance", "-5"], "argument --balance"),
        (["--balance", "many"], "'many' is not a number of tokens"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    try:
        status = main(["keys", "create", *options])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert says in capsys.readouterr().err


def test_a_database_that_is_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_DATABASE_URL", "postgresql://sf:hush@127.0.0.1:1/x")
    assert main(["keys", "list"]) == 1
    err = capsys.readouterr().err
    assert "cannot be used" in err
    assert "hush" not in err

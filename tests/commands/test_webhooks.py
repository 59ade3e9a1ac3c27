"""``search-foundation webhooks``, through the command's own door."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_foundation.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SF_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_the_secret_stays_until_it_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    def said(word: str) -> list[str]:
        assert main(["webhooks", word]) == 0
        return capsys.readouterr().out.splitlines()

    (first,) = said("secret")
    assert said("secret") == [first]
    second, kept = said("rotate")
    assert kept == first != second
    assert said("retire") == said("secret") == [second]


def test_a_secret_of_the_operator_is_printed_and_not_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_WEBHOOK_SECRET", "one two")
    assert main(["webhooks", "secret"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    for word in ("rotate", "retire"):
        assert main(["webhooks", word]) == 2
        assert "SF_WEBHOOK_SECRET" in capsys.readouterr().err


def test_without_the_database(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "data").write_bytes(b"in the way")
    assert main(["webhooks", "secret"]) == 1
    said = capsys.readouterr()
    assert "cannot be used" in said.err
    assert not said.out

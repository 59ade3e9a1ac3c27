"""What all commands have in common."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search_foundation.cli import COMMANDS, main


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "search_foundation.cli", *words],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_help_names_every_command() -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    shown = command(name, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: search-foundation {name}")


def test_help_imports_nothing_heavy() -> None:
    listed = command_modules("--help")
    assert not {"torch", "grpc", "pydantic", "sqlalchemy", "yaml"} & listed


def test_serve_loads_the_engine_only_where_it_computes() -> None:
    """What is refused needs none, nor does the process that starts several others and watches them."""
    assert not {"torch", "sqlalchemy"} & command_modules("serve", "sing")


def command_modules(*words: str) -> set[str]:
    code = (
        "import sys\nfrom search_foundation.cli import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(shown.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("sing",),
        ("serve",),
        ("serve", "sing"),
        ("serve", "embed", "--workers", "0"),
        ("serve", "embed", "--workers", "two"),
        ("up", "sing"),
        ("up", "--port", "99999"),
        ("up", "--port", "eighty"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: search-foundation" in capsys.readouterr().err


def test_a_host_nobody_knows_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--host", "no such host"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "SF_HOST" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("search-foundation ")


@pytest.mark.parametrize(
    "words", [("models", "list"), ("keys", "list"), ("gateway", "--print"), ("serve", "embed")]
)
def test_a_wrong_setting_is_one_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("http_prot: 5\n")
    shown = command("--config", str(file), *words)
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1
    assert "http_prot" in shown.stderr


def test_the_settings_file_is_used(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("http_port: 8099\n")
    shown = command("--config", str(file), "gateway", "--print")
    assert "port_value: 8099" in shown.stdout


def test_a_reader_that_has_seen_enough() -> None:
    shown = subprocess.run(
        f"{sys.executable} -m search_foundation.cli models list | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stderr == ""

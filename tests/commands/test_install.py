"""``scripts/install``, behind every target of the Makefile, with a Python that only says what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
echo "noise of pip $*"
case "$*" in *%s*) exit 1;; esac
"""
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit %d
[ "$2" = compileall ] && exit
[ "$1" = -V ] && { echo Python 3.9.1; exit; }
mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$(dirname "$0")/pip" "$3/bin/pip"
"""


def install(
    folder: Path, *, breaks: str = "nothing", too_old: bool = False
) -> subprocess.CompletedProcess[str]:
    for name, text in (("pip", PIP % breaks), ("python", PYTHON % too_old)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return subprocess.run(
        [ROOT / "scripts" / "install", folder / ".venv"],
        env={**os.environ, "PYTHON": str(folder / "python")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_each_step_is_a_line_with_its_seconds(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *steps = done.stdout.splitlines()
    assert re.fullmatch(r"Installing into \S+/\.venv, once: \d+ to \d+ minutes and [\d.]+ GB, .*", first)
    assert all(re.fullmatch(r"  [^.]+ \.\.\. \d+ s", step) for step in steps), steps
    assert [step.split(" ...")[0].strip() for step in steps] == [
        "virtual environment",
        "pip",
        "PyTorch",
        "all other packages, and kernels for this CPU",
        "bytecode, on all cores",
    ]
    assert (tmp_path / ".venv" / "install.log").read_text().count("noise of pip") == 3


def test_what_pip_says_is_shown_when_it_fails(tmp_path: Path) -> None:
    done = install(tmp_path, breaks="torch")
    assert done.returncode == 1
    assert done.stdout.endswith("  PyTorch ... failed\n")
    assert "noise of pip install --no-compile --constraint constraints.txt torch" in done.stderr
    assert f"The rest is in {tmp_path}/.venv/install.log." in done.stderr


def test_an_old_python_is_named(tmp_path: Path) -> None:
    done = install(tmp_path, too_old=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.9.1 is too old")
    assert not (tmp_path / ".venv").exists()

"""The team of threads of ``native/team.h``, by itself: C is compiled against it, see ``team.c``."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("team") / "team"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    source = Path(__file__).with_name("team.c")
    subprocess.run([*compiler, "-O2", "-pthread", f"-I{_ROOT}", str(source), "-o", str(built)], check=True)
    return built


def printed(program: Path, case: str) -> list[str]:
    done = subprocess.run([program, case], capture_output=True, text=True, check=True, timeout=200)
    return done.stdout.splitlines()


def test_helpers_take_the_niceness_of_the_thread_whose_job_they_do(program: Path) -> None:
    assert printed(program, "niceness") == ["usual +0 +0 +0 +0", "later +5 +5 +5 +5", "another +0 +0 +0 +0"]


def test_jobs_at_once_each_have_all_their_members(program: Path) -> None:
    assert printed(program, "together") == ["present 16"]


def test_a_forked_process_and_the_one_it_came_from_have_all_their_members(program: Path) -> None:
    who = [line.split()[0] for line in printed(program, "forked")]
    assert who == ["parent", "child", "grandchild", "child", "parent"]


def test_helpers_are_there_as_long_as_their_thread(program: Path) -> None:
    *jobs, inside, after = printed(program, "lifetime")
    assert [len(line.split()) - 1 for line in jobs] == [2, 64, 3]
    assert inside == "threads 65"
    assert after == "threads 1"


def test_each_task_is_done_once_and_behind_the_phase_before_it(program: Path) -> None:
    assert printed(program, "stress") == ["wrong 0"]


def test_who_waits_long_uses_no_core(program: Path) -> None:
    """Four members of which three wait half a second: 1.5 s of CPU if they spun."""
    assert int(printed(program, "waiting")[0].removeprefix("tenths ")) <= 3

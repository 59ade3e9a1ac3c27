"""The data folder is for its owner alone, also where it was made by somebody less careful."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.core.folders import data_folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_it_is_made_for_its_owner_and_so_are_those_above_it(tmp_path: Path) -> None:
    data_folder(tmp_path / "a" / "b")
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o755, 0o700), (0o777, 0o700), (0o750, 0o700), (0o700, 0o700), (0o1777, 0o1777), (0o2775, 0o2775)],
    ids=oct,
)
def test_one_that_is_there_is_closed_unless_it_is_shared(tmp_path: Path, before: int, after: int) -> None:
    above, data = tmp_path / "above", tmp_path / "above" / "data"
    data.mkdir(parents=True)
    above.chmod(0o755)
    data.chmod(before)
    data_folder(data)
    assert [mode(above), mode(data)] == [0o755, after]

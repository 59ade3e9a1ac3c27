"""``search-foundation embed``: files and texts on the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from search_foundation.cli import main
from tests.media.films import film, sound
from tests.media.pictures import pdf, photograph
from tests.omni_checkpoints import NANO, write_served


def lines(capsys: pytest.CaptureFixture[str]) -> np.ndarray:
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["index"] for each in found] == list(range(len(found)))
    return np.array([each["embedding"] for each in found])


def test_files_and_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_served(tmp_path / "models", NANO)
    monkeypatch.setenv("SF_MODEL_DIR", str(tmp_path / "models"))
    files = {
        "a.jpg": photograph(),
        "b.wav": sound(),
        "c.mp4": film(),
        "d.pdf": pdf((300.0, 200.0), (200.0, 300.0)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    chosen = ["embed", "--model", NANO, "--dimensions", "64"]
    assert main([*chosen, "a dog", *paths[:3]]) == 0
    each = lines(capsys)
    assert each.shape == (4, 64)
    np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1, atol=1e-5)
    assert len(np.unique(each.round(4), axis=0)) == 4
    assert main([*chosen, "--together", "a dog", *paths[:3]]) == 0
    assert lines(capsys).shape == (1, 64)
    assert main([*chosen, paths[3]]) == 0
    assert lines(capsys).shape == (2, 64)
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog\n"))
    assert main(chosen) == 0
    np.testing.assert_allclose(lines(capsys), each[:1], atol=1e-6)
    (tmp_path / "e.wav").write_bytes(sound()[:2000])
    assert main([*chosen, str(tmp_path / "e.wav")]) == 1
    assert "The audio of input 0 cannot be used: it is truncated" in capsys.readouterr().err

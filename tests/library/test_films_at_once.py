"""Many films at once from Python: all are answered, and memory does not grow with their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.media.films import film
from tests.omni_checkpoints import NANO, write_served

SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from search_foundation import load

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

name, model_dir, film, count = sys.argv[1:]
with load(name, model_dir=model_dir, device="cpu", dtype="float32") as model:
    # What the allocator and the threads keep is there after some films, one behind the other.
    for _ in range(4):
        wanted = model.encode(Path(film))
    one = peak()
    with ThreadPoolExecutor(int(count)) as callers:
        found = list(callers.map(lambda _: model.encode(Path(film)), range(int(count))))
    apart = max(float(np.abs(each - wanted).max()) for each in found)
    print(json.dumps({"answered": len(found), "apart": apart, "more": peak() - one}))
"""
MIB = 1 << 20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.soak)])
def test_films_wait_for_each_others_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A film is 13 MiB of pixels and as much of patches, of which the bound lets no two stand together."""
    write_served(tmp_path, NANO)
    path = tmp_path / "film.mp4"
    path.write_bytes(film("mp4", "mpeg4", 33, (448, 320)))
    monkeypatch.setenv("SF_MEDIA_BYTES_IN_FLIGHT", str(32 * MIB))
    monkeypatch.setenv("SF_MEDIA_DECODERS", "2")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, NANO, str(tmp_path), str(path), str(count)],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["answered"] == count
    assert told["apart"] < 1e-5
    assert told["more"] < 160 * MIB, f"{told['more'] / MIB:.0f} MiB more than films one by one"

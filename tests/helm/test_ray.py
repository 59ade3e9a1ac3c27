"""The recipe for Ray Serve, run by Ray in an environment of its own: `make soak`.

RAY_ENVIRONMENT may name one that has `ray[serve]` already.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from gateway.child import ends_with_parent
from search_foundation import load
from tests.helm.chart import REPOSITORY
from tests.helm.pods import call
from tests.servers import free_port

RAY = "ray[serve]==2.60.0"
MODEL = "all-MiniLM-L6-v2"
TEXTS = ["hello world", "good morning", "a longer text about the planet Mars"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with Ray, which is lent this one's packages; skips where no index has Ray."""
    folder = Path(os.environ.get("RAY_ENVIRONMENT") or tmp_path_factory.mktemp("ray") / "venv")
    if not (folder / "bin" / "serve").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        done = subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", RAY],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"no package index gives {RAY}: {done.stderr.strip()[-300:]}")
    (packages,) = folder.glob("lib/*/site-packages")
    lent = [sysconfig.get_path("purelib"), str(REPOSITORY), str(REPOSITORY / "protos")]
    (packages / "lent.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def url(ray: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`serve run embedder:app` in a folder with a copy of the recipe; the address that it answers at."""
    # Ray's sockets lie in this folder, and their paths may have no more than 107 bytes.
    folder, port = Path("/tmp") / f"sf-ray-{os.getpid()}", free_port()
    folder.mkdir()
    shutil.copy(REPOSITORY / "deploy" / "ray" / "embedder.py", folder)
    environment = os.environ | {
        "PATH": f"{ray / 'bin'}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    head = free_port()
    start = ["start", "--head", "--node-ip-address=127.0.0.1", f"--port={head}", "--num-cpus=2"]
    start += ["--min-worker-port=0", "--max-worker-port=0"]  # free ones, not ten thousand of its own
    start += [f"--{name}={free_port()}" for name in ("ray-client-server-port", "dashboard-agent-listen-port")]
    start += ["--include-dashboard=false", f"--object-store-memory={200 << 20}", "--disable-usage-stats"]
    environment["RAY_ADDRESS"] = f"127.0.0.1:{head}"
    (folder / "http.yaml").write_text(
        f"proxy_location: EveryNode\nhttp_options: {{host: 127.0.0.1, port: {port}}}\n"
        "applications:\n  - name: embedder\n    route_prefix: /\n    import_path: embedder:app\n"
        f"    args: {{model: {MODEL}, replicas: '2'}}\n",
        encoding="utf-8",
    )
    run = ["run", "--app-dir", folder, folder / "http.yaml"]
    log = folder / "serve.log"
    with ExitStack() as ending:
        ending.callback(shutil.rmtree, folder, ignore_errors=True)
        output = ending.enter_context(log.open("wb"))
        for words in (["ray", *start, "--block"], ["serve", *run]):
            process = subprocess.Popen(
                [ray / "bin" / words[0], *words[1:]],
                env=environment,
                cwd=folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=ends_with_parent(),
            )
            ending.callback(_end, process)
            if words[0] == "ray":
                _until(lambda: b"Ray runtime started" in log.read_bytes(), process, log)
        _until(lambda: _answers(f"http://127.0.0.1:{port}"), process, log)
        yield f"http://127.0.0.1:{port}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 600
    while not condition():
        text = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        assert process.poll() is None, text
        assert time.monotonic() < until, text
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        return call(url, {"input": ["a"]})[0] == 200
    except (OSError, json.JSONDecodeError):
        return False  # nobody listens yet, or Serve says so in its own words


def test_its_vectors_are_those_of_the_python_door(url: str) -> None:
    status, answer = call(url, {"input": TEXTS})
    assert status == 200, answer
    with load(MODEL) as model:
        expected = model.encode(TEXTS)
    np.testing.assert_allclose(np.array(answer["embeddings"]), expected, atol=1e-5)


def test_options_of_the_door_pass_and_wrong_ones_are_refused_in_its_words(url: str) -> None:
    status, answer = call(url, {"input": TEXTS, "normalized": False})
    assert (status, len(answer["embeddings"])) == (200, len(TEXTS))
    status, answer = call(url, {"input": TEXTS, "task": "no-such-task"})
    assert status == 422
    assert "task" in answer["detail"]

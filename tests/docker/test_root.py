"""The Dockerfile run step by step in Debian, and its image as containers run it: read-only, not root.

Long, and needs root, debootstrap and a package index: `make soak`. DEBIAN_ROOT may name a base to use again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.docker import image
from tests.helm.pods import call, fetch, run_batch
from tests.servers import free_port

MISSING = [name for name in ("debootstrap", "unshare", "setpriv") if shutil.which(name) is None]
NOT_ROOT = os.geteuid() != 0
LIMIT_MIB = 2500

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(MISSING) or NOT_ROOT, reason="needs root and debootstrap"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> image.Stage:
    base = Path(os.environ.get("DEBIAN_ROOT") or tmp_path_factory.mktemp("debian") / "root")
    image.debian(base)
    builder = image.Builder(tmp_path_factory.mktemp("image"), base, {"TORCH_INDEX": ""})
    return builder.build(image.DOCKER / "Dockerfile", "cpu")


@contextmanager
def container(
    stage: image.Stage, words: Sequence[str], folder: Path, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        command = image.run(stage, words, folder, variables)
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> int:
    """Send SIGTERM to the container's first process, as an engine does."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    return process.wait(40)


def ask_until_ready(url: str, *processes: subprocess.Popen[bytes], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while True:
        assert all(process.poll() is None for process in processes), "a container ended"
        try:
            if '"status":"ok"' in fetch(url):
                return
        except OSError:
            assert time.monotonic() < until, f"{url} is not ready"
        time.sleep(0.2)


def test_the_image_is_complete_and_small(built: image.Stage) -> None:
    assert built.user == "10001:10001"
    assert "every module imports" in built.log[-1]
    used = sum(path.lstat().st_size for path in built.root.rglob("*") if path.is_file()) >> 20
    assert used < LIMIT_MIB
    assert not list(built.root.glob("opt/search-foundation/bin/pip*"))
    assert not list(built.root.glob("usr/bin/*gcc*"))


def test_a_container_is_nobody_and_writes_nowhere_else(built: image.Stage, tmp_path: Path) -> None:
    script = "id -u; id -g; grep CapBnd /proc/self/status;"
    script += "touch /tmp/a /models/a /var/lib/search-foundation/a; touch /x /opt/x /etc/x"
    shell = replace(built, entrypoint=())
    command = image.run(shell, ["/bin/sh", "-c", script], tmp_path / "places")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["10001", "10001", "CapBnd:", "0000000000000000"]
    assert done.stderr.count("Read-only file system") == 3
    assert len(done.stderr.splitlines()) == 3


def test_containers_answer_together_and_stop_when_told(built: image.Stage, tmp_path: Path) -> None:
    grpc, metrics, rest = free_port(), free_port(), free_port()
    places = {name: tmp_path / name for name in ("services", "gateway")}
    topology = {
        "listener": {"host": "127.0.0.1", "port": rest},
        "admin": {"host": "127.0.0.1", "port": free_port()},
        "pools": [
            {
                "name": "services",
                "capabilities": ["embed", "rerank", "classify", "batch"],
                "models": ["all-MiniLM-L6-v2"],
                "addresses": [f"127.0.0.1:{grpc}"],
            }
        ],
    }
    (places["gateway"] / "tmp").mkdir(parents=True)
    (places["gateway"] / "tmp" / "topology.yaml").write_text(yaml.safe_dump(topology), encoding="utf-8")
    variables = {"SF_HOST": "127.0.0.1", "SF_AUTH": "false", "SF_DRAIN_SECONDS": "0"}
    serve = ["serve", *topology["pools"][0]["capabilities"]]
    ports = {"SF_GRPC_PORT": str(grpc), "SF_METRICS_PORT": str(metrics), "HF_HUB_OFFLINE": "1"}
    front = ["gateway", "--topology", "/tmp/topology.yaml"]
    with (
        container(built, serve, places["services"], **variables, **ports) as services,
        container(built, front, places["gateway"], **variables) as gateway,
    ):
        url = f"http://127.0.0.1:{rest}"
        ask_until_ready(f"{url}/ready", services, gateway)
        status, answer = call(
            f"{url}/v1/embeddings", {"model": "all-MiniLM-L6-v2", "input": "hello world", "normalized": True}
        )
        assert status == 200
        assert answer["data"][0]["embedding"][0] == pytest.approx(-0.034478, abs=2e-3)
        assert run_batch(url, {}) == [f"line-{i}" for i in range(5)]
        assert stop(gateway) == 0
        assert stop(services) == 0

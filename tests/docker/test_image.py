"""The image's build steps in a clean folder with a clean environment, and what the image promises."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.docker import image
from tests.helm.chart import CHART, REPOSITORY

DOCKER = REPOSITORY / "deploy" / "docker"
CLEAN = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `COPY . .` would bring: the files git knows, without anything built."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    _run([source / "deploy/docker/build-wheel.sh", source, out, sys.executable])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def prefix(source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and nothing else of ours; dependencies are lent by the running one."""
    folder = tmp_path_factory.mktemp("prefix") / "search-foundation"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # A plain line adds the folder alone, not the editable install that a .pth file inside it would.
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    shutil.copy(Path(sys.executable).parent / "envoy", folder / "bin" / "envoy")
    _run([source / "deploy/docker/install-wheel.sh", wheel.parent, folder])
    _run([source / "deploy/docker/prune.sh", folder])
    return folder


def _run(command: list[str | Path], **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env=CLEAN | variables,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "gateway/filter.lua",
        "services/core/access/admit.lua",
        "services/core/catalog/models/minilm.yaml",
        "searchfoundation/v1/embed_pb2.py",
        "searchfoundation/v1/embed_rest_pb2_grpc.py",
        "search_foundation/commands/serve.py",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    source = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "services").rglob("*.py")}
    assert source <= names


def test_the_source_stays_as_it_was(source: Path, wheel: Path) -> None:
    assert wheel.exists()
    assert not list(source.rglob("*_pb2.py"))
    assert not (source / "build").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no triton"])
def test_an_installed_environment_passes_its_check(
    source: Path, prefix: Path, triton: bool, tmp_path: Path
) -> None:
    variables = {"TMPDIR": str(prefix.parent)}
    if not triton:  # as in the CPU image, whose torch does not bring it
        absent = "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n"
        (tmp_path / "triton.py").write_text(absent, encoding="utf-8")
        variables["PYTHONPATH"] = str(tmp_path)
    printed = _run([source / "deploy/docker/check.sh", prefix], **variables)
    assert "search-foundation 0.1.0" in printed
    assert "already there." in printed
    assert "every module imports" in printed


def test_the_check_fails_where_something_is_missing(source: Path, prefix: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(prefix, broken, symlinks=True)
    for script in (broken / "bin").iterdir():
        if not script.is_symlink() and script.read_bytes().startswith(b"#!"):
            script.write_text(
                script.read_text(encoding="utf-8").replace(str(prefix), str(broken)), encoding="utf-8"
            )
    next(broken.rglob("gateway/filter.lua")).unlink()
    done = subprocess.run(
        [source / "deploy/docker/check.sh", broken],
        env=CLEAN,
        cwd="/",
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0


def test_pruning_leaves_no_packaging_tools(prefix: Path) -> None:
    assert not list(prefix.glob("bin/pip*"))
    assert not list(prefix.glob("lib/*/site-packages/pip"))
    assert list(prefix.rglob("services/**/*.pyc"))


def test_pruning_keeps_the_program_that_torch_looks_for(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (packages,) = tmp_path.glob("lib/*/site-packages")
    for name in ("bin/torch_shm_manager", "bin/test_api", "include/a.h", "test/a.py", "lib/a.a", "lib/a.so"):
        (packages / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / "torch" / name).touch()
    _run([DOCKER / "prune.sh", tmp_path])
    left = {str(path.relative_to(packages / "torch")) for path in packages.rglob("*") if path.is_file()}
    assert left == {"bin/torch_shm_manager", "lib/a.so"}


def test_pruning_refuses_a_folder_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = subprocess.run(
        [DOCKER / "prune.sh", tmp_path], env=CLEAN, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "is not in" in done.stderr


@pytest.mark.soak
def test_dependencies_install_from_the_pinned_list(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search-foundation"
    _run([source / "deploy/docker/install-dependencies.sh", source, folder, "cpu"], HOME=str(tmp_path))
    assert (folder / "bin" / "envoy").exists()


def _instructions() -> list[str]:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def test_the_linter_has_no_complaint(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    subprocess.run([program, DOCKER / "Dockerfile"], check=True, timeout=60)
    wrong = (DOCKER / "Dockerfile").read_text(encoding="utf-8") + "RUN cd /tmp && sudo true\n"
    (tmp_path / "Dockerfile").write_text(wrong, encoding="utf-8")
    done = subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1


def test_the_image_is_pinned_multi_stage_and_not_root() -> None:
    lines = _instructions()
    named = [re.fullmatch(r"FROM (\S+) AS (\S+)", line) for line in lines if line.startswith("FROM")]
    stages = {match[2]: match[1] for match in named if match}
    assert len(stages) == len(named)
    assert list(stages)[-2:] == ["cuda", "cpu"], "without a target the last one is built"
    (base,) = [line for line in lines if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.fullmatch(r"ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-[a-z]+", base)
    # Behind any other variable some engines take a stage for an image to be pulled.
    assert set(stages.values()) == {"${PYTHON_IMAGE}", "base"}
    assert "USER 10001:10001" in lines
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values["podSecurityContext"]["runAsUser"] == 10001
    assert 'ENTRYPOINT ["search-foundation"]' in lines
    final = lines[lines.index("FROM ${PYTHON_IMAGE} AS base") :]
    assert not [line for line in final if "apt-get" in line or "pip install" in line]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_image_is_made_from_dependencies_of_its_own(device: str) -> None:
    stages = image.needed((DOCKER / "Dockerfile").read_text(encoding="utf-8"), device)
    assert stages == {device, f"install-{device}", "wheel", "base", "${PYTHON_IMAGE}"}
    (step,) = [
        line
        for line in _instructions()
        if f"install-dependencies.sh /src /opt/search-foundation {device}" in line
    ]
    assert step.startswith("RUN ")


def test_every_step_of_the_image_is_a_script_that_exists() -> None:
    steps = {match for line in _instructions() for match in re.findall(r"deploy/docker/([\w-]+\.sh)", line)}
    scripts = {path.name for path in DOCKER.glob("*.sh")}
    assert steps == scripts
    for name in scripts:
        assert os.stat(DOCKER / name).st_mode & stat.S_IXUSR
        text = (DOCKER / name).read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in text
        subprocess.run(["bash", "-n", DOCKER / name], check=True)


def test_the_image_and_the_chart_are_of_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{chart["appVersion"]}"' in project


def test_the_build_context_leaves_out_what_the_wheel_does_not_need() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "**"
    copied = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "deploy/docker"}
    copied |= {"search_foundation", "services", "gateway", "protos"}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied

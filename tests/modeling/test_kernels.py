"""Each instruction set's C by itself against double precision, on this processor or an emulated one.

Sets of this processor run as they are. AVX-512 is emulated by SIMDe (Debian: libsimde-dev), arm64 by qemu
(Debian: qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross).
"""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.modeling.native import instructions, library
from services.core.modeling.native.instructions import InstructionSet
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.checkpoints import spec
from tests.decoder_checkpoints import V5_TASKS, write_v5
from tests.modeling.support import cosine, random_ids

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_NATIVE = _ROOT / "services/core/modeling/native"
_SIMDE = Path("/usr/include/simde/x86/avx512.h")
_ARM_COMPILER = "aarch64-linux-gnu-gcc"

Build = Callable[..., Path]


def flags(name: str) -> list[str]:
    """The instructions that the package's own build asks for."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    for module in project["tool"]["setuptools"]["ext-modules"]:
        if module["name"].endswith(f"._kernels_{name}"):
            return [flag for flag in module["extra-compile-args"] if flag.startswith("-m")]
    raise AssertionError(f"pyproject.toml builds no _kernels_{name}")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Compile the test program, or with ``shared`` the kernels alone."""

    def make(
        name: str, *more: str, compiler: str = sysconfig.get_config_var("CC") or "cc", shared: bool = False
    ) -> Path:
        built = tmp_path / name
        file = f"kernels_{name}.c"
        what = ["-shared", "-fPIC", str(_NATIVE / file)]
        if not shared:
            what = [f'-DKERNELS="{file}"', str(_HERE / "kernels.c")]
        command = [
            *shlex.split(compiler),
            "-O1",
            "-std=gnu11",
            "-pthread",
            "-Wno-psabi",
            *more,
            f"-I{_NATIVE}",
        ]
        subprocess.run([*command, *what, "-o", str(built), "-lm"], check=True)
        return built

    return make


def passes(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "neon", "portable"])
def test_a_set_of_this_processor_computes_what_doubles_do(build: Build, name: str) -> None:
    if instructions._lacking(InstructionSet(name)):
        pytest.skip(f"this processor has no {name}: it is emulated below")
    assert "lanes" in passes(build(name, *flags(name)))


@pytest.mark.skipif(not _SIMDE.is_file(), reason="SIMDe (libsimde-dev) is not installed")
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512"])
def test_avx512_computes_what_doubles_do_where_it_is_emulated(build: Build, name: str) -> None:
    assert "16 lanes" in passes(build(name, f"-I{_HERE / 'emulated'}"))


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this processor needs no emulation for it")
@pytest.mark.skipif(
    not shutil.which(_ARM_COMPILER) or not shutil.which("qemu-aarch64"),
    reason="gcc-aarch64-linux-gnu or qemu-user is not installed",
)
def test_neon_computes_what_doubles_do_where_it_is_emulated(build: Build) -> None:
    program = build("neon", "-static", compiler=_ARM_COMPILER)
    assert "4 lanes" in passes("qemu-aarch64", program)


@pytest.mark.skipif(not _SIMDE.is_file(), reason="SIMDe (libsimde-dev) is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_with_adapters_runs_on_emulated_avx512(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    name = "avx512_bf16" if dtype == torch.bfloat16 else "avx512"
    emulated = library.open_library(build(name, f"-I{_HERE / 'emulated'}", shared=True))
    folder = write_v5(tmp_path / "v5", "nano")
    entry = spec(
        family="jina_v5_text",
        dimensions=32,
        context_length=4096,
        tasks=V5_TASKS,
        adapters={task: task for task in V5_TASKS},
    )
    items = [
        EncodeItem(random_ids(n, 200), task) for n, task in ((1, None), (70, V5_TASKS[0]), (17, V5_TASKS[1]))
    ]

    def vectors(chosen: InstructionSet) -> list[np.ndarray]:
        monkeypatch.setattr(instructions._chosen, "instructions", chosen)
        network = load_text_encoder(entry, folder, device=torch.device("cpu"), dtype=dtype)
        return [np.asarray(vector) for vector in network.forward(items)]

    wanted = vectors(InstructionSet.TORCH)
    monkeypatch.setattr(library, "load", lambda _: emulated)
    for ours, theirs in zip(vectors(InstructionSet(name)), wanted, strict=True):
        if dtype == torch.float32:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert cosine(ours, theirs) > 0.9995

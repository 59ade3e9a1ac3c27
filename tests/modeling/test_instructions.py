"""The choice of the instruction set, on processors made up."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.core.modeling.device import choose_dtype
from services.core.modeling.native import instructions
from services.core.modeling.native.instructions import InstructionSet, available, choose, current, describe

AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx2", "fma3", "f16c")
ZEN3 = ("avx2", "fma3", "f16c")
SAPPHIRE_RAPIDS = (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16")
Make = Callable[..., None]

FILES = ("avx512_bf16", "avx512", "avx2", "neon", "portable")


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_chosen", instructions._Chosen())
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("ONEDNN_MAX_CPU_ISA", None)


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Make this a CPU with some capabilities, and a package with some compiled files."""

    def make(capabilities: tuple[str, ...], files: tuple[str, ...] = FILES) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(instructions, "_FOLDER", tmp_path)
        for name in files:
            (tmp_path / f"_kernels_{name}{instructions.EXTENSION_SUFFIXES[0]}").touch()

    return make


@pytest.mark.parametrize(
    ("capabilities", "best", "dtype"),
    [
        (SAPPHIRE_RAPIDS, "amx", torch.bfloat16),
        ((*AVX512, "avx512_bf16"), "avx512_bf16", torch.bfloat16),
        (AVX512, "avx512", torch.float32),
        (ZEN3, "avx2", torch.float32),
        (("neon", "bf16"), "neon", torch.float32),
        (("sse4_2",), "portable", torch.float32),
    ],
)
def test_auto_is_the_best_of_the_cpu_and_the_dtype_what_it_multiplies(
    cpu_with: Make, cpu: torch.device, capabilities: tuple[str, ...], best: str, dtype: torch.dtype
) -> None:
    cpu_with(capabilities)
    assert current() == best
    assert describe() == f"{best}, the best instruction set of this CPU"
    assert choose_dtype(cpu) == dtype


def test_a_lower_set_can_be_asked_for(cpu_with: Make, cpu: torch.device) -> None:
    cpu_with(SAPPHIRE_RAPIDS)
    assert choose("avx2") is current() is InstructionSet.AVX2
    assert describe() == "avx2; the CPU also has amx, which was not asked for"
    assert choose_dtype(cpu) == torch.float32
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_what_the_operator_told_onednn_stays(cpu_with: Make) -> None:
    cpu_with(SAPPHIRE_RAPIDS)
    os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
    choose("avx512")
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41"


def test_auto_leaves_onednn_alone(cpu_with: Make) -> None:
    cpu_with(ZEN3)
    choose("auto")
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_a_name_that_is_none_is_refused_with_those_there_are(cpu_with: Make) -> None:
    cpu_with(ZEN3)
    with pytest.raises(
        ValueError, match=r"'sse9' is no instruction set; use auto or one of avx2, portable, torch"
    ):
        choose("sse9")


def test_a_set_that_the_cpu_lacks_is_refused_with_the_reason(cpu_with: Make) -> None:
    cpu_with(ZEN3)
    with pytest.raises(
        ValueError, match=r"avx512 is not this CPU's, which lacks avx512_f, avx512_bw.* there are avx2"
    ):
        choose("avx512")


def test_a_set_that_was_not_compiled_is_refused_and_said_at_the_start(
    cpu_with: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cpu_with((*AVX512, "avx512_bf16"), ("portable",))
    with pytest.raises(ValueError, match="avx512_bf16 was not compiled"):
        choose("avx512_bf16")
    with caplog.at_level(logging.WARNING):
        assert choose() is InstructionSet.PORTABLE
    assert "computing with portable; the CPU also has avx512_bf16, which was not compiled" in caplog.text


def test_without_a_compiler_torch_does_everything(cpu_with: Make) -> None:
    cpu_with(ZEN3, ())
    assert available() == (InstructionSet.TORCH,)
    assert current() is InstructionSet.TORCH


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN names the instructions of x86-64 so")
def test_onednn_is_lowered_with_it() -> None:
    script = (
        "import torch\n"
        "from services.core.modeling.native.instructions import choose\n"
        "choose('portable')\n"
        "from services.core.modeling.layers.linear import linear\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    layer = linear(torch.eye(32, dtype=dtype), None, torch.device('cpu'))\n"
        "    x = torch.arange(64, dtype=dtype).reshape(2, 32)\n"
        "    assert torch.equal(layer(x), x)\n"
    )
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    (said,) = (line for line in done.stdout.splitlines() if ",cpu,isa:" in line)
    assert said.endswith("isa:Intel SSE4.1")

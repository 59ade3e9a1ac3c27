"""Shared pieces: the CPU, and the choice between torch and the compiled kernels of each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.core.modeling.native import instructions
from services.core.modeling.native.instructions import InstructionSet


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Networks of the tests are too small to share, and cores that others use make them wait."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the calling thread's number of torch threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SETS = [which for which in instructions.available() if which is not InstructionSet.TORCH]


@pytest.fixture(params=SETS or ["none compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    """Run a test on the kernels of each instruction set that this CPU has."""
    assert request.param in SETS, "the kernels are not compiled: reinstall the project"
    monkeypatch.setattr(instructions._chosen, "instructions", request.param)
    return request.param


@pytest.fixture(params=[*SETS, InstructionSet.TORCH])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    """Run a test on the kernels of each instruction set that this CPU has, and again on torch alone."""
    monkeypatch.setattr(instructions._chosen, "instructions", request.param)
    return request.param

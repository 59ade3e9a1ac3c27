"""Shared pieces: the CPU, and the choice between the compiled kernels and torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.core.modeling.native import decoder, encoder, ops
from services.core.modeling.native.library import library


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


@pytest.fixture(params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled kernels, where this CPU can, and again on torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(ops, "library", lambda: None)
        monkeypatch.setattr(encoder, "library", lambda: None)
        monkeypatch.setattr(decoder, "library", lambda: None)
    elif not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU has no AVX-512 BF16")
    else:
        assert library() is not None, "the kernels are not compiled: reinstall the project"
    return request.param

"""Devices and number formats by name."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

from services.core.modeling.cuda import ops
from services.core.modeling.device import choose_device, choose_dtype


def test_named_devices_and_dtypes_are_taken_as_they_are(cpu: torch.device) -> None:
    assert choose_device("cpu") == cpu
    assert choose_dtype(cpu, "float32") == torch.float32
    assert choose_dtype(cpu, "bfloat16") == torch.bfloat16


def test_auto_takes_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="'cuda:1' is not available"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    ("version", "serves"), [("2.9.1+cu128", False), ("2.11.0+cu130", True), ("2.13.0+cu130", True)]
)
def test_cuda_with_an_old_torch_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, version: str, serves: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert choose_device("cpu").type == "cpu"
    for name in ("auto", "cuda"):
        if serves:
            assert choose_device(name).type == "cuda"
            continue
        with pytest.raises(ValueError, match=r"torch 2\.9\.1\+cu128 is too old for device 'cuda'"):
            choose_device(name)


@pytest.mark.parametrize("triton", [True, False])
def test_what_runs_on_cuda_is_said_in_words(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(ops, "available", lambda: triton)
    words = ops.describe(torch.device("cuda"))
    assert words.startswith(f"NVIDIA H100 (compute capability 9.0), torch {torch.__version__}; ")
    assert ("products in kernels of our own, triton 3." in words) is triton
    assert ("no triton: attention is torch's" in words) is not triton


@pytest.mark.parametrize(("name", "reason"), [("gpu", "is no device"), ("meta", "is not supported")])
def test_other_names_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose_device(name)

"""Devices and number formats by name."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize(("name", "reason"), [("gpu", "is no device"), ("meta", "is not supported")])
def test_other_names_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose_device(name)

"""Where a model runs and in which number format."""

from __future__ import annotations

import torch

from services.core.modeling.native.instructions import current


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device. ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"'{name}' is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"'{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}' is not available on this machine")
    return device


def choose_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """Turn ``auto``, ``float32`` or ``bfloat16`` into a dtype.

    ``auto`` is bf16 where the device multiplies it natively: CUDA, and instruction sets with such products.
    Others would widen each number first: slower than fp32, and less accurate.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if current().multiplies_bf16 else torch.float32

"""Where a model runs and in which number format."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from services.core.modeling.native.instructions import current

_OLDEST_ON_CUDA = "2.11"
"""The oldest torch with which the networks have run on CUDA."""


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    ValueError if it is not there, or if torch is too old for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    if torch.__version__ < TorchVersion(_OLDEST_ON_CUDA):
        raise ValueError(
            f"torch {torch.__version__} is too old for device '{name}': it needs {_OLDEST_ON_CUDA} or newer"
        )
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

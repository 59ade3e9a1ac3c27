"""The gRPC server: lifecycle, call pipeline, errors, health, metrics, logs, traces, REST codec."""

from services.core.serving.capability import ServingCapability
from services.core.serving.failure import rpc_status
from services.core.serving.ports import PortInUseError
from services.core.serving.server import Server, StopReason

__all__ = [
    "PortInUseError",
    "Server",
    "ServingCapability",
    "StopReason",
    "rpc_status",
]

"""The gRPC server: lifecycle, call pipeline, errors, health, metrics, logs, traces, REST codec."""

from services.core.serving.doors import Access, Admission, Capability, Engine, Principal
from services.core.serving.failure import rpc_status
from services.core.serving.server import PortInUseError, Server, StopReason

__all__ = [
    "Access",
    "Admission",
    "Capability",
    "Engine",
    "PortInUseError",
    "Principal",
    "Server",
    "StopReason",
    "rpc_status",
]
